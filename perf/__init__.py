"""Benchmarks: ``python -m pytest perf``. How to read and take them: ``perf/notes/README.md``."""
