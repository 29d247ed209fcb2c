"""Where a benchmark runs, its clock, and what a result is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorakit import jit
from lorakit.dtypes import bfloat16, float32
from lorakit.graph import Graph
from lorakit.nn import DeviceRef, PagedKVCacheCollection
from lorakit.nn.arrays import upload
from lorakit.testing import PagedCache

# What one NVIDIA H200 reached (driver 580, CUDA 13.0, bf16, random data), not its data sheet.
BYTES_PER_SECOND = 4.5e12  # reading device memory with 16-byte loads
FLOPS_PER_SECOND = 790e12  # cuBLAS bf16 product of 8192^3
LEAST_SECONDS = 2e-6  # below this a floor says nothing: starting and ending a kernel costs as much

ROUNDS = 30
WARMUP_ROUNDS = 3

Case = TypeVar("Case")


@dataclass(frozen=True)
class Work:
    """What an op cannot avoid.

    Attributes:
        bytes: Each input read once and each output written once, counted from the arrays.
        flops: Floating-point operations, from the shapes.
    """

    bytes: int
    flops: int = 0

    @property
    def floor(self) -> float:
        """Seconds below which the op cannot run on an H200."""
        return max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND, LEAST_SECONDS)

    @property
    def is_bound_by_products(self) -> bool:
        """True if the operations and not the bytes make the floor."""
        return self.flops / FLOPS_PER_SECOND > self.bytes / BYTES_PER_SECOND


class Place:
    """The device that the benchmarks run on, and how time passes there.

    On a GPU a call is captured in a CUDA graph, and a round is one replay between two events, after a
    buffer of four times the L2 cache was read: everything the call reads is cold. The buffer is read
    and not written, because written lines would have to leave the cache while the call runs. Twice
    the cache would do; four times takes long enough for the host to queue events and replay behind.

    On a CPU a round is one call by the host's clock, caches warm.
    """

    def __init__(self, device: DeviceRef) -> None:
        self.device = device
        self.is_gpu = device.is_gpu()
        self.dtype = bfloat16 if self.is_gpu else float32
        if self.is_gpu:
            self._cuda = jit.import_cupy().cuda
            properties = self._cuda.runtime.getDeviceProperties(device.id)
            elements = 4 * int(properties["l2CacheSize"]) // 4
            noise = random_array((elements,), float32, np.random.default_rng(0))
            self._larger_than_l2 = self.asarray(noise)
            self._start, self._end = self._cuda.Event(), self._cuda.Event()

    def asarray(self, array: NDArray[Any]) -> Any:
        """The array there; on a CPU itself."""
        return upload(array, self.device)

    def random(self, shape: tuple[int, ...], rng: np.random.Generator, size: float = 1.0) -> Any:
        """Normal numbers of a size in the place's dtype, drawn there."""
        if not self.is_gpu:
            return random_array(shape, self.dtype, rng, size)
        generator = jit.import_cupy().random.default_rng(int(rng.integers(2**31)))
        drawn = generator.standard_normal(shape, np.float32) * np.float32(size)
        return drawn.astype(self.dtype)

    def cache(self, cache: PagedCache) -> PagedKVCacheCollection:
        """A cache there; on a CPU with the same memory."""
        return PagedKVCacheCollection(
            self.asarray(cache.blocks),
            self.asarray(cache.cache_lengths),
            self.asarray(cache.lookup_table),
            cache.max_lengths,
        )

    def round_of(self, call: Callable[[], Any]) -> Callable[[], float]:
        """A function that runs `call` once and returns the seconds it took."""
        call()  # compiles, starts libraries up
        if not self.is_gpu:
            return lambda: _host_seconds(call)
        with Graph() as graph:
            call()

        def one_round() -> float:
            self._larger_than_l2.max()
            self._start.record()
            graph.replay()
            self._end.record()
            self._end.synchronize()
            return float(self._cuda.get_elapsed_time(self._start, self._end)) / 1e3

        return one_round

    def round_in_turn(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        """A function that runs all calls, in one graph, and returns the seconds of one of them.

        No clock starts or stops between the calls, and none of them finds its memory in the cache if
        together they use more than fits.
        """
        if not self.is_gpu:
            return lambda: sum(map(_host_seconds, calls)) / len(calls)
        for call in calls[:2]:  # compiles, starts libraries up
            call()
        with Graph() as graph:
            for call in calls:
                call()

        def one_round() -> float:
            self._start.record()
            graph.replay()
            self._end.record()
            self._end.synchronize()
            return float(self._cuda.get_elapsed_time(self._start, self._end)) / 1e3 / len(calls)

        return one_round

    def median_of(self, call: Callable[[], Any]) -> float:
        """Median seconds of a call."""
        one_round = self.round_of(call)
        rounds = [one_round() for _ in range(WARMUP_ROUNDS + ROUNDS)]
        return statistics.median(rounds[WARMUP_ROUNDS:])

    def least_reading(self) -> float:
        """What the clock shows for a copy of one element, in seconds."""
        source, target = (self.asarray(np.ones(1, np.float32)) for _ in range(2))

        def copy() -> None:
            target[...] = source

        return self.median_of(copy)


@dataclass(frozen=True)
class Baseline:
    """Something to compare a time with.

    Attributes:
        name: What it is, in two words.
        call: Runs it.
    """

    name: str
    call: Callable[[], Any]


_elapsed = 0.0


def clock() -> float:
    """pytest-benchmark's timer here: the seconds of all rounds so far, by the clock of `Place`."""
    return _elapsed


def measure(
    benchmark: Any,
    place: Place,
    call: Callable[[], Any],
    work: Work,
    baseline: Baseline,
    share_of_budget: float,
) -> None:
    """Time a call that was checked, and its baseline.

    Args:
        benchmark: pytest-benchmark's fixture.
        place: Where it runs.
        call: Takes no argument and can be captured in a graph.
        work: What it cannot avoid.
        baseline: Timed by the same clock.
        share_of_budget: What the check returned.
    """
    _time(benchmark, place.round_of(call), work, share_of_budget)
    benchmark.extra_info.update(
        baseline=baseline.name, baseline_us=place.median_of(baseline.call) * 1e6
    )


def measure_in_turn(
    benchmark: Any,
    place: Place,
    calls: Sequence[Callable[[], Any]],
    work: Work,
    baseline: Baseline,
    share_of_budget: float,
    more: Mapping[str, str],
) -> None:
    """As `measure`, for a call on other arrays each time (`Place.round_in_turn`).

    Args:
        calls: The call on each of the arrays; so many that they do not fit in the cache.
        work: Of one call.
        baseline: Its call is repeated as often.
        more: Further columns of the table.
    """
    _time(benchmark, place.round_in_turn(calls), work, share_of_budget)
    one_round = place.round_in_turn([baseline.call] * len(calls))
    rounds = [one_round() for _ in range(WARMUP_ROUNDS + ROUNDS)]
    seconds = statistics.median(rounds[WARMUP_ROUNDS:])
    benchmark.extra_info.update(baseline=baseline.name, baseline_us=seconds * 1e6, more={**more})


def _time(
    benchmark: Any, one_round: Callable[[], float], work: Work, share_of_budget: float
) -> None:
    def timed() -> None:
        global _elapsed
        _elapsed += one_round()

    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    benchmark.extra_info.update(
        asdict(work), floor_us=work.floor * 1e6, share_of_budget=share_of_budget
    )


def cases(cpu: Sequence[Case], gpu: Sequence[Case]) -> Sequence[Case]:
    """The cases for the device there is."""
    return gpu if DeviceRef.current().is_gpu() else cpu


def random_array(
    shape: tuple[int, ...], dtype: Any, rng: np.random.Generator, size: float = 1.0
) -> NDArray[Any]:
    """Normal numbers of a size; large arrays repeat a prime number of them, so that no two rows agree.

    Random, because zeros are faster; repeated, because drawing gigabytes takes longer than measuring.
    """
    drawn = rng.standard_normal(min(int(np.prod(shape)), 1_000_003), np.float32)
    return np.resize((drawn * np.float32(size)).astype(dtype), shape)


def copy_of(place: Place, work: Work) -> Baseline:
    """A copy that reads half of the bytes and writes as many."""
    source = random_array((max(1, work.bytes // 8),), float32, np.random.default_rng(1))
    here, there = place.asarray(source), place.asarray(source.copy())
    copyto = jit.import_cupy().copyto if place.is_gpu else np.copyto  # a memcpy, not a kernel
    return Baseline("copy", lambda: copyto(there, here))


def _host_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
