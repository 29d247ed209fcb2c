"""Runs processes under the sanitizers' runtimes, and turns their reports into exceptions.

AddressSanitizer (with UndefinedBehaviorSanitizer) and ThreadSanitizer must be in a process from its start, so
they are preloaded; only kernels are instrumented. Reports made during a launch go to a file and become the
message of an `EmulatorError`; the process lives on.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from tests.emulator import build

# suppress_equal_*: each test must see a bug, not only the first one. symbolize=0: gcc's symbolizer knows only
# the libraries that were there at the first report, so lines are looked up here.
_LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
_OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0:detect_odr_violation=0:"
        "symbolize=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    # Reads and writes that uninstrumented libraries make through libc are none of our business.
    "thread": {
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:suppress_equal_stacks=0:"
        "suppress_equal_addresses=0:exitcode=0:symbolize=0"
    },
}
_MOST_CHARACTERS = 8_000  # of a report; a bug in a loop is reported each time


def environment(sanitizer: str) -> dict[str, str]:
    """The environment of a process whose kernels run under a sanitizer: "address" or "thread"."""
    paths = []
    for library in _LIBRARIES[sanitizer]:
        query = [build.compiler(), f"-print-file-name={library}"]
        paths.append(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    return {
        **os.environ,
        **_OPTIONS[sanitizer],
        "LD_PRELOAD": ":".join(paths),
        "LORAKIT_EMULATOR_SANITIZER": sanitizer,
    }


def obstacle(sanitizer: str) -> str:
    """Why processes cannot run under a sanitizer here; an empty string when they can."""
    for library in _LIBRARIES[sanitizer]:
        query = [build.compiler(), f"-print-file-name={library}"]
        path = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            return f"{build.compiler()} comes without {library}"
    probe = subprocess.run(
        [sys.executable, "-c", ""], env=environment(sanitizer), capture_output=True, text=True
    )
    return f"no process starts under {sanitizer}: {probe.stderr[:500]}" if probe.returncode else ""


@functools.cache
def _loaded() -> tuple[ctypes.CDLL, ...]:
    """The sanitizers' runtimes of this process. Each has its own idea of where reports go."""
    return tuple(ctypes.CDLL(path) for path in os.environ.get("LD_PRELOAD", "").split(":") if "san.so" in path)


def check_loaded(sanitizer: str) -> None:
    """Raises `EmulatorError` unless this process was started for kernels of this kind."""
    if sanitizer and os.environ.get("LORAKIT_EMULATOR_SANITIZER") != sanitizer:
        raise build.EmulatorError(
            f"kernels under the {sanitizer} sanitizer need a process started by "
            f"python -m tests.emulator --sanitizer {sanitizer}"
        )


@functools.cache
def _report_file() -> IO[bytes]:
    return tempfile.TemporaryFile()


def begin_reports(runtime: ctypes.CDLL) -> None:
    """From here on, reports are collected. `runtime` prints them should the process die."""
    file = _report_file()
    file.seek(0)
    file.truncate()
    runtime.emulator_show_reports_at_death(file.fileno())
    for library in _loaded():
        library.__sanitizer_set_report_fd(ctypes.c_void_p(file.fileno()))


def end_reports() -> str:
    """What was reported since `begin_reports`; later reports go to stderr again."""
    for library in _loaded():
        library.__sanitizer_set_report_fd(ctypes.c_void_p(2))
    file = _report_file()
    file.seek(0)
    return with_lines(file.read(_MOST_CHARACTERS).decode(errors="replace"))


def with_lines(report: str) -> str:
    """The report with functions and source lines in place of addresses in kernel libraries."""

    def look_up(match: re.Match[str]) -> str:
        library = build.cache_folder() / match["library"]
        if not library.exists():
            return match[0]
        command = ["addr2line", "-e", str(library), "-fCips", match["offset"]]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or match[0]

    return re.sub(r"\((?:\S*/)?(?P<library>[\w-]+\.so)\+(?P<offset>0x[0-9a-f]+)\)", look_up, report)


def poison(address: int, size: int) -> bool:
    """Makes AddressSanitizer guard memory until it is freed; False when it is not there."""
    if os.environ.get("LORAKIT_EMULATOR_SANITIZER") != "address":
        return False
    _loaded()[0].__asan_poison_memory_region(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return True
