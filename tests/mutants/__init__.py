"""Mutants of the CUDA sources: does a test fail when a kernel is wrong? See RESULTS.md.

``python -m tests.mutants`` makes them mechanically, at every site of six classes, and runs the kernel
tests on the emulator over each.
"""
