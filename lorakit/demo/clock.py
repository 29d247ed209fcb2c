"""How long a call takes: GPU events, or the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from lorakit import jit
from lorakit.nn import DeviceRef

_CALLS = 5  # between two events


def median_seconds(call: Callable[[], Any], device: DeviceRef, rounds: int) -> float:
    """Median time of a call that has run before.

    On a GPU a round is some calls in a row between two events: what passes there, with the gaps in
    which it waits for the host, but without the host's start.
    """
    if device.is_gpu():
        return statistics.median(_between_events(call) for _ in range(rounds))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _between_events(call: Callable[[], Any]) -> float:
    cuda = jit.import_cupy().cuda
    start, end = cuda.Event(), cuda.Event()
    start.record()
    for _ in range(_CALLS):
        call()
    end.record()
    end.synchronize()
    return float(cuda.get_elapsed_time(start, end)) / 1e3 / _CALLS
