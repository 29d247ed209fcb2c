"""Runs processes under the sanitizers' runtimes, and turns their reports into messages.

AddressSanitizer (with UndefinedBehaviorSanitizer) and ThreadSanitizer must be in a process from its
start, so they are preloaded; only kernels are instrumented. What they report during a launch goes
to a file and becomes the message of an `EmulatorError`; the process lives on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tests.emulator import build

_LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
# suppress_equal_*: each test must see a bug, not only the first one. symbolize=0: gcc's symbolizer
# knows only the libraries that were there at its first report, so lines are looked up here.
# handle_*: the emulator does.
_OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0:"
        "detect_odr_violation=0:symbolize=0:handle_segv=0:handle_sigbus=0:handle_sigfpe=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:symbolize=0:handle_segv=0",
    },
    # What uninstrumented libraries do to memory through libc is none of our business.
    "thread": {
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:suppress_equal_stacks=0:"
        "suppress_equal_addresses=0:exitcode=0:symbolize=0"
    },
}
_MOST_BYTES = 32_000  # that are looked at; a bug in a loop is reported each time
_MOST_REPORTS = 3  # that are shown
_FIBER = re.compile(r"  Thread (T\d+) '(thread \d+)' \(.*\) created by .* at:")
# Frames of the emulator and AddressSanitizer's dump of its shadow.
_NOISE = re.compile(
    r"emulator::launch<|emulator::run\(|::thread_main\(\)|emulator::Fiber::|libffi"
    r"|^(=>|  )0x[0-9a-f]+: ?[0-9a-f]|^Shadow byte|^  [A-Z][\w ]+: +[0-9a-f]{2} ?|^$"
)


def _paths(sanitizer: str) -> list[str]:
    """The runtime libraries as the compiler names them: absolute paths if it has them."""
    return [
        subprocess.run(
            [build.compiler(), f"-print-file-name={library}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for library in _LIBRARIES[sanitizer]
    ]


def environment(sanitizer: str) -> dict[str, str]:
    """The environment of a process whose kernels run under a sanitizer: "address" or "thread"."""
    return {
        **os.environ,
        **_OPTIONS[sanitizer],
        "LD_PRELOAD": ":".join(_paths(sanitizer)),
        "LORAKIT_EMULATOR_SANITIZER": sanitizer,
    }


def obstacle(sanitizer: str) -> str:
    """Why no process can run under a sanitizer here; an empty string when one can."""
    missing = [path for path in _paths(sanitizer) if not Path(path).is_absolute()]
    if missing:
        return f"{build.compiler()} comes without {', '.join(missing)}"
    command = [sys.executable, "-c", ""]
    probe = subprocess.run(command, env=environment(sanitizer), capture_output=True, text=True)
    return f"no process starts under it: {probe.stderr[:500]}" if probe.returncode else ""


def check_loaded(sanitizer: str) -> None:
    """Raises `EmulatorError` unless this process was started for kernels of this kind."""
    if sanitizer and os.environ.get("LORAKIT_EMULATOR_SANITIZER") != sanitizer:
        raise build.EmulatorError(
            f"kernels under the {sanitizer} sanitizer need a process started by "
            f"python -m tests.emulator --sanitizer {sanitizer}"
        )


def poison(address: int, size: int) -> bool:
    """Have AddressSanitizer guard memory until it is freed; False where it is not loaded."""
    if os.environ.get("LORAKIT_EMULATOR_SANITIZER") != "address":
        return False
    poison_region = ctypes.CDLL(None).__asan_poison_memory_region
    poison_region(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return True


# ---- Reports


@functools.cache
def _file() -> IO[bytes]:
    return tempfile.TemporaryFile()


@contextlib.contextmanager
def reports(runtime: ctypes.CDLL) -> Iterator[list[str]]:
    """Collects what is reported in the block: a list that has one text at its end.

    Sanitizers write to file descriptor 2, which is led elsewhere for a while; should one of them
    end the process, `runtime` shows what it said.
    """
    file = _file()
    file.seek(0)
    file.truncate()
    stderr = os.dup(2)
    runtime.emulator_show_reports_at_death(file.fileno(), stderr)
    os.dup2(file.fileno(), 2)
    texts: list[str] = []
    try:
        yield texts
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        file.seek(0)
        texts.append(readable(file.read(_MOST_BYTES).decode(errors="replace")))


def readable(text: str) -> str:
    """The first reports, with functions and source lines in place of addresses in kernels."""
    parts = [part for part in re.split(r"^=+\n", text, flags=re.MULTILINE) if part.strip()]
    text = build.with_lines("\n".join(parts[:_MOST_REPORTS]))
    text = _FIBER.sub(r"  \1 is \2 of the block", text)
    return "\n".join(line for line in text.splitlines() if not _NOISE.search(line))
