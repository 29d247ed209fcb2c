"""The sticky error word: bad values that only the device could see.

A kernel never acts on a slot, page, position or offset that is out of range: a bad slot is a base row,
a bad page is skipped on store and masked on read, a position past the rotary table is clamped, offsets
are cut to the batch. Each sets a bit in one word per device, which `check_errors` reads.
"""

from __future__ import annotations

from lorakit import jit

# The bits of cuda_src/common/errors.cuh.
MEANINGS = {
    1: "a slot in lora_ids is not below max_num_loras (treated as a base row)",
    2: "a page in lookup_table is missing or not below num_pages (skipped on store, masked on read)",
    4: "a position is past the end of freqs_cis (clamped to its last row)",
    8: "row offsets decrease, do not start at 0, or end past the last row (cut to the batch)",
}


class DeviceValueError(ValueError):
    """Kernels met bad values in device arrays since the last `check_errors`."""


def check_errors() -> None:
    """Raise `DeviceValueError` if any kernel met a bad value since the last call, on any device.

    Waits for the work queued so far, then reads and clears the error word of each device that ran a
    kernel. Ops never call it, so that they can be captured in a CUDA graph.
    """
    problems = []
    for place, bits in jit.take_errors():
        problems += [f"{place}: {text}" for bit, text in MEANINGS.items() if bits & bit]
    if problems:
        raise DeviceValueError("; ".join(problems))
