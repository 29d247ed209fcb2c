"""Runs a command whose kernels are compiled with a sanitizer.

For example ``python -m tests.emulator --sanitizer address pytest tests/emulator``.
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.emulator import sanitizers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("--sanitizer", choices=("address", "thread"), required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run")
    arguments = parser.parse_args()
    reason = sanitizers.obstacle(arguments.sanitizer)
    if reason:
        sys.exit(f"skipped: {reason}")
    os.execvpe(arguments.command[0], arguments.command, sanitizers.environment(arguments.sanitizer))


main()
