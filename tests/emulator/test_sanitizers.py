"""The sanitizers see planted bugs in every order of execution, and nothing in sound kernels."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys

import pytest

from tests.emulator import SCHEDULES, emulator, plants, sanitizers
from tests.emulator.backend import REPOSITORY


@functools.cache
def messages(sanitizer: str) -> dict[str, dict[str, str]]:
    """What each plant raised under each schedule, in one process under the sanitizer."""
    reason = sanitizers.obstacle(sanitizer)
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.emulator", "--sanitizer", sanitizer]
    command += [sys.executable, "-m", "tests.emulator.plants"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if result.returncode != 0:
        return {name: dict.fromkeys(SCHEDULES, result.stderr) for name in plants.PLANTS[sanitizer]}
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("sanitizer", "plant"),
    [(sanitizer, plant) for sanitizer, names in plants.PLANTS.items() for plant in names],
)
def test_plant(sanitizer: str, plant: str) -> None:
    """A report with both source lines where one is due, and silence elsewhere.

    UBSan reports a line once in the life of a process, so the first order has to do for its errors.
    """
    expected = plants.PLANTS[sanitizer][plant].report
    for schedule in SCHEDULES[:1] if "runtime error" in expected else SCHEDULES:
        message = messages(sanitizer)[plant][schedule]
        if expected:
            assert re.search(expected, message), message
        else:
            assert not message


def test_a_sanitizer_that_is_not_loaded() -> None:
    with pytest.raises(RuntimeError, match="need a process started by"):
        sanitizers.check_loaded("thread" if emulator.sanitizer != "thread" else "address")
