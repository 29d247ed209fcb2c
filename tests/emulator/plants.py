"""Small kernels that the sanitizers must report, or must not.

test_sanitizers.py runs this in a process under a sanitizer. It prints a JSON object: for each plant
and each schedule the message that was raised, or an empty string.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.emulator import SCHEDULES, EmulatorError, emulator


@dataclass(frozen=True)
class Plant:
    """A launch of a kernel of tests/emulator/kernels, and a pattern of the sanitizer's report."""

    source: str
    kernel: str
    threads: int
    shared_bytes: int
    args: tuple[Any, ...]
    report: str = ""

    @property
    def name(self) -> str:
        return f"lorakit::{self.kernel}"


def _ints(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.int32)


def _floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


_PIPELINE = (_floats(5, 128), _floats(5, 128), 5)
_PRODUCT = (_floats(16, 8), np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16))
_RACE = r"data race[^$]*{0}_kernel<false>.*threads.cu:\d+[^$]*{0}_kernel<false>.*threads.cu:\d+"


def _outside(kind: int, offset: int, report: str) -> Plant:
    pattern = rf"{report}[^$]*outside_kernel.*threads.cu:\d+"
    return Plant("threads.cu", "outside_kernel", 1, 64, (_floats(8), kind, offset), pattern)


_CLEAN = {
    "sum": Plant("threads.cu", "tree_sum_kernel", 256, 0, (_floats(2), _floats(512))),
    "matrices": Plant("matrices.cu", "multiply_kernel<__half>", 32, 1024, _PRODUCT),
    "pipeline": Plant("copies.cu", "pipeline_kernel<1, true>", 32, 1024, _PIPELINE),
    "neighbours": Plant("threads.cu", "neighbour_kernel<true>", 64, 0, (_ints(64), 3)),
    "halves": Plant("threads.cu", "halves_kernel<true>", 128, 0, (_ints(128), 3)),
    "early return": Plant("threads.cu", "early_return_kernel", 100, 0, (_ints(100), 70)),
    "block": Plant("threads.cu", "race_kernel<true>", 64, 0, (_ints(64),)),
    "warp": Plant("threads.cu", "warp_race_kernel<true>", 32, 0, (_ints(32),)),
    "atomics": Plant(
        "threads.cu", "atomics_kernel", 64, 0, (_floats(1), _ints(1), _ints(1), _floats(64))
    ),
    "inside": Plant("threads.cu", "outside_kernel", 1, 64, (_floats(8), 2, 7)),
}

PLANTS: dict[str, dict[str, Plant]] = {
    "address": {
        **_CLEAN,
        "after a global array": _outside(0, 8, "use-after-poison"),
        "before a global array": _outside(0, -1, "use-after-poison"),
        "after a static shared array": _outside(1, 8, "global-buffer-overflow"),
        "after a dynamic shared array": _outside(2, 8, "use-after-poison"),
        "after a local array": _outside(3, 8, "stack-buffer-overflow"),
        "cp.async of what lies beyond": Plant(
            "undefined.cu",
            "copy_kernel",
            1,
            16,
            (_floats(8), 8, 16),
            r"use-after-poison[^$]*READ of size 16[^$]*copy_kernel.*undefined.cu:\d+",
        ),
        # As on a GPU, where compute-sanitizer passes it too.
        "cp.async of no bytes of what lies beyond": Plant(
            "undefined.cu", "copy_kernel", 1, 16, (_floats(8), 8, 0)
        ),
        "misaligned vector": Plant(
            "undefined.cu",
            "misaligned_kernel",
            1,
            0,
            (_floats(8), 1),
            r"undefined.cu:\d+:\d+: runtime error: [^$]* misaligned address",
        ),
        "index": Plant(
            "undefined.cu",
            "index_kernel",
            1,
            0,
            (_ints(1), 4),
            r"undefined.cu:\d+:\d+: runtime error: index 4 out of bounds",
        ),
        "shift": Plant(
            "undefined.cu",
            "shift_kernel",
            1,
            0,
            (_ints(1), 32),
            r"undefined.cu:\d+:\d+: runtime error: shift exponent 32",
        ),
    },
    "thread": {
        **_CLEAN,
        "missing __syncthreads": Plant(
            "threads.cu", "race_kernel<false>", 64, 0, (_ints(64),), _RACE.format("race")
        ),
        "missing __syncwarp": Plant(
            "threads.cu", "warp_race_kernel<false>", 32, 0, (_ints(32),), _RACE.format("warp_race")
        ),
        "missing second barrier": Plant(
            "threads.cu",
            "neighbour_kernel<false>",
            64,
            0,
            (_ints(64), 3),
            _RACE.format("neighbour"),
        ),
        "missing second named barrier": Plant(
            "threads.cu", "halves_kernel<false>", 128, 0, (_ints(128), 3), _RACE.format("halves")
        ),
        "missing barrier after a copy": Plant(
            "copies.cu",
            "pipeline_kernel<1, false>",
            32,
            1024,
            _PIPELINE,
            r"data race[^$]*pipeline_kernel<1, false>.*copies.cu:\d+",
        ),
    },
}


def run(plant: Plant, schedule: str) -> str:
    args = [emulator.asarray(a) if isinstance(a, np.ndarray) else a for a in plant.args]
    try:
        with emulator.scheduled(schedule, seed=1):
            emulator.launch(plant, (2,), args)
    except EmulatorError as error:
        return str(error)
    return ""


def main() -> None:
    messages = {
        name: {schedule: run(plant, schedule) for schedule in SCHEDULES}
        for name, plant in PLANTS[emulator.sanitizer].items()
    }
    print(json.dumps(messages))


if __name__ == "__main__":
    main()
