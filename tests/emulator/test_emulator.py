"""The emulator, checked with small kernels of its own.

It computes what a GPU would, and reports what a GPU would not forgive.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import DTypeLike

from tests.emulator import SCHEDULES, EmulatedArray, EmulatorError, emulator


@dataclass(frozen=True)
class Kernel:
    """A kernel of tests/emulator/kernels."""

    source: str
    kernel: str
    threads: int | tuple[int, ...]
    shared_bytes: int = 0

    @property
    def name(self) -> str:
        return f"lorakit::{self.kernel}"


racy = pytest.mark.skipif(emulator.sanitizer == "thread", reason="ThreadSanitizer reports the race")


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> str:
    """Each order of execution in turn."""
    return str(request.param)


# ---- Matrices


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.float16, "__half"), (ml_dtypes.bfloat16, "__nv_bfloat16")],
    ids=["fp16", "bf16"],
)
def test_ldmatrix_and_mma_multiply(dtype: DTypeLike, name: str, schedule: str) -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((16, 16)).astype(dtype)
    b = rng.standard_normal((16, 8)).astype(dtype)
    a[3, 5] = 1e-7 if dtype == np.float16 else 1e-39  # subnormal
    d = emulator.empty((16, 8), np.float32)
    with emulator.scheduled(schedule):
        emulator.launch(
            Kernel("matrices.cu", f"multiply_kernel<{name}>", 32, 1024),
            (1,),
            (d, emulator.asarray(a), emulator.asarray(b)),
        )
    expected = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(d, expected, rtol=0, atol=3e-6)


def test_mma_needs_a_whole_warp() -> None:
    d, a = emulator.empty((16, 8), np.float32), emulator.zeros((16, 16), np.float16)
    with pytest.raises(EmulatorError, match="ldmatrix_x4 needs all 32 lanes"):
        emulator.launch(Kernel("matrices.cu", "multiply_kernel<__half>", 31, 1024), (1,), (d, a, a))


# ---- Threads


def test_barriers_in_a_tree_sum(schedule: str) -> None:
    x = np.arange(3 * 256, dtype=np.float32)
    out = emulator.empty(3, np.float32)
    with emulator.scheduled(schedule, seed=5):
        emulator.launch(
            Kernel("threads.cu", "tree_sum_kernel", 256), (3,), (out, emulator.asarray(x))
        )
    np.testing.assert_array_equal(out, x.reshape(3, 256).sum(axis=1))


def test_atomics(schedule: str) -> None:
    x = np.arange(40, dtype=np.float32)
    total, count, bits = (emulator.zeros(1, t) for t in (np.float32, np.int32, np.uint32))
    with emulator.scheduled(schedule):
        emulator.launch(
            Kernel("threads.cu", "atomics_kernel", 40),
            (2,),
            (total, count, bits, emulator.asarray(x)),
        )
    assert (total[0], count[0], bits[0]) == (2 * x.sum(), 80, 0xFFFFFFFF)


def test_shuffles(schedule: str) -> None:
    out = emulator.empty((5, 32), np.int32)
    with emulator.scheduled(schedule):
        emulator.launch(Kernel("threads.cu", "shuffles_kernel", 32), (1,), (out,))
    lane = np.arange(32)
    np.testing.assert_array_equal(out[0], lane // 8 * 8 + 5)
    np.testing.assert_array_equal(out[1], lane ^ 3)
    np.testing.assert_array_equal(out[2], np.where(lane % 16 < 14, lane + 2, lane))
    np.testing.assert_array_equal(out[3], np.minimum(lane + 1, 31))
    np.testing.assert_array_equal(out[4], np.where(lane < 16, 100 + (lane ^ 8), 200 + (lane ^ 1)))


def test_votes(schedule: str) -> None:
    out = emulator.empty(3, np.uint32)
    with emulator.scheduled(schedule):
        emulator.launch(Kernel("threads.cu", "votes_kernel", 32), (1,), (out,))
    assert out.tolist() == [0xAAAAAAAA, 1, 0]


def test_barrier_waits_for_live_threads_only(schedule: str) -> None:
    out = emulator.zeros(100, np.int32)
    with emulator.scheduled(schedule):
        emulator.launch(Kernel("threads.cu", "early_return_kernel", 100), (1,), (out, np.int32(70)))
    np.testing.assert_array_equal(out, np.where(np.arange(100) < 70, 42, 0))


def test_threads_of_three_dimensions() -> None:
    x = np.ones(2 * 64, np.float32)
    out = emulator.empty(2, np.float32)
    with pytest.raises(ValueError, match="cannot be launched"):
        emulator.launch(Kernel("threads.cu", "tree_sum_kernel", (64, 32, 1)), (2,), (out, x))


@racy
@pytest.mark.parametrize("second_barrier", ["true", "false"])
def test_missing_barrier_is_found_by_some_order(second_barrier: str) -> None:
    """A slot that is written again while others may still read it: right in order only."""
    kernel = Kernel("threads.cu", f"neighbour_kernel<{second_barrier}>", 64)
    expected = 3 * np.minimum(np.arange(64) + 1, 63) + 3000
    right = {}
    for schedule in SCHEDULES:
        out = emulator.empty(64, np.int32)
        with emulator.scheduled(schedule, seed=1):
            emulator.launch(kernel, (1,), (out, np.int32(3)))
        right[schedule] = np.array_equal(out, expected)
    synchronised = second_barrier == "true"
    assert right == {"in_order": True, "lifo": synchronised, "random": synchronised}


@pytest.mark.parametrize("second_barrier", ["true", "false"])
def test_named_barriers(second_barrier: str) -> None:
    """Two halves of a block meet apart and not equally often; some order finds a missing barrier."""
    kernel = Kernel("threads.cu", f"halves_kernel<{second_barrier}>", 128)
    successors = np.minimum(np.arange(128) + 1, np.repeat([63, 127], 64))
    expected = np.repeat([3, 6], 64) * successors + np.repeat([3000, 15000], 64)
    right = {}
    for schedule in SCHEDULES:
        out = emulator.empty(128, np.int32)
        with emulator.scheduled(schedule, seed=1):
            emulator.launch(kernel, (1,), (out, np.int32(3)))
        right[schedule] = np.array_equal(out, expected)
    synchronised = second_barrier == "true"
    assert right == {"in_order": True, "lifo": synchronised, "random": synchronised}


# ---- Memory


def test_shared_memory_begins_as_nan() -> None:
    out = emulator.zeros((2, 64), np.float32)
    emulator.launch(Kernel("threads.cu", "uninitialised_kernel", 64, 256), (2,), (out,))
    assert np.isnan(out).all()


@pytest.mark.parametrize("source_bytes", [0, 8, 16])
def test_copies_are_nan_until_waited_for(source_bytes: int) -> None:
    before, after = emulator.zeros(4, np.float32), emulator.zeros(4, np.float32)
    x = emulator.asarray(np.arange(1, 5, dtype=np.float32))
    emulator.launch(
        Kernel("copies.cu", "poison_kernel", 1), (1,), (before, after, x, np.int32(source_bytes))
    )
    assert np.isnan(before).all()
    np.testing.assert_array_equal(after, np.where(np.arange(4) < source_bytes // 4, x, 0))


@pytest.mark.parametrize(("pending", "right"), [(0, True), (1, True), (2, False)])
def test_wait_counts(pending: int, right: bool, schedule: str) -> None:
    x = np.random.default_rng(0).standard_normal((5, 4 * 32)).astype(np.float32)
    out = emulator.empty(x.shape, np.float32)
    kernel = Kernel("copies.cu", f"pipeline_kernel<{pending}, true>", 32, 2 * 4 * 32 * 4)
    with emulator.scheduled(schedule):
        emulator.launch(kernel, (1,), (out, emulator.asarray(x), np.int32(5)))
    assert np.array_equal(out, x) == right


@racy
def test_missing_barrier_after_a_wait_is_found_in_order() -> None:
    x = emulator.zeros((5, 4 * 32), np.float32)
    out = emulator.empty(x.shape, np.float32)
    kernel = Kernel("copies.cu", "pipeline_kernel<1, false>", 32, 2 * 4 * 32 * 4)
    emulator.launch(kernel, (1,), (out, x, np.int32(5)))
    assert np.isnan(out).any()


def test_copies_nobody_waits_for() -> None:
    x = emulator.zeros(4, np.float32)
    with pytest.raises(EmulatorError, match=r"thread 0 returned with 1 cp\.async copies"):
        emulator.launch(Kernel("copies.cu", "forgotten_kernel", 1), (1,), (x,))


def test_misaligned_copy() -> None:
    x = emulator.zeros(8, np.float32)
    with pytest.raises(
        EmulatorError, match=r"copies.cu:\d+: cp_async_16: the source .* not 16-byte aligned"
    ):
        emulator.launch(Kernel("copies.cu", "forgotten_kernel", 1), (1,), (x[1:],))


@pytest.mark.skipif(emulator.sanitizer == "address", reason="AddressSanitizer guards the guards")
@pytest.mark.parametrize(
    ("kind", "offset", "message"),
    [
        (0, 8, "a write 0 bytes past the end of the array of argument 0"),
        (0, -1, "a write 4 bytes before the beginning of the array of argument 0"),
        (2, 9, "a write 4 bytes past the end of a shared array of 32 bytes"),
    ],
)
def test_writes_outside_arrays_are_seen_without_a_sanitizer(
    kind: int, offset: int, message: str
) -> None:
    kernel = Kernel("threads.cu", "outside_kernel", 1, 64)
    with pytest.raises(EmulatorError, match=message):
        emulator.launch(
            kernel, (1,), (emulator.zeros(8, np.float32), np.int32(kind), np.int32(offset))
        )


def test_more_shared_memory_than_the_launch_gives() -> None:
    with pytest.raises(
        EmulatorError, match="takes 36 bytes of dynamic shared memory, the launch gives 32"
    ):
        emulator.launch(Kernel("threads.cu", "greedy_kernel", 1, 32), (1,), ())


# ---- Reports

_OUT = 64


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "divergent_barrier_kernel()",
            r"block \([01], 0, 0\): divergent barrier.*\n"
            r"  threads 0-39: __syncthreads at .*threads.cu:\d+\n"
            r"  threads 40-63: __syncthreads at .*threads.cu:\d+\n",
        ),
        (
            "deadlock_kernel()",
            r"deadlock: no thread can go on\n"
            r"  threads 0-32: __syncthreads at .*threads.cu:\d+\n"
            r"  threads 33-63: __syncwarp\(mask 0xffffffff\) at .*threads.cu:\d+\n",
        ),
        (
            "divergent_shuffle_kernel(int*)",
            r"divergent collective.*\n"
            r"  threads 0-7: __shfl_xor_sync\(mask 0xffffffff\) at .*threads.cu:\d+\n"
            r"  threads 8-31: __shfl_sync\(mask 0xffffffff\) at .*threads.cu:\d+\n",
        ),
        ("barrier_number_kernel()", r"named_barrier: id is 0, must be 1 to 15"),
        ("part_of_a_warp_kernel()", r"named_barrier: 48 threads of a block of 64, must be whole"),
        ("too_many_for_barrier_kernel()", r"named_barrier: 96 threads of a block of 64, must be"),
        (
            "other_counts_kernel()",
            r"(divergent barrier: threads expect different numbers|deadlock)",
        ),
        (
            "named_deadlock_kernel()",
            r"deadlock: no thread can go on\n"
            r"  threads 0-31: named_barrier\(2, 64\) at .*threads.cu:\d+\n"
            r"  threads 32-63: returned\n",
        ),
        ("wrong_mask_kernel(int*)", r"__shfl_sync: the mask 0x0000ffff leaves out the caller"),
        ("returned_lane_kernel(int*)", r"__shfl_sync reads lane 3, which has returned"),
    ],
)
def test_reports(kernel: str, message: str, schedule: str) -> None:
    name, _, parameters = kernel.partition("(")
    args = (emulator.zeros(_OUT, np.int32),) if parameters != ")" else ()
    with emulator.scheduled(schedule), pytest.raises(EmulatorError, match=message):
        emulator.launch(Kernel("threads.cu", name, _OUT), (2,), args)
    test_barriers_in_a_tree_sum(schedule)  # the emulator goes on as if nothing had happened


@pytest.mark.skipif(emulator.sanitizer == "thread", reason="ThreadSanitizer handles faults itself")
@pytest.mark.parametrize(
    ("kernel", "args", "message"),
    [
        (
            "wild_kernel",
            (),
            r"thread 0: Segmentation fault of the CPU .*wild_kernel.*undefined.cu:\d+",
        ),
        ("division_kernel", (0,), r"Floating point exception of the CPU .*division_kernel"),
        ("endless_kernel", (), r"still running after 0.2 seconds; thread 0 is in .*endless_kernel"),
    ],
)
def test_faults_and_endless_loops_do_not_end_the_process(
    kernel: str, args: tuple[int, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = emulator.zeros(8, np.float32 if kernel == "wild_kernel" else np.int32)
    monkeypatch.setattr(emulator, "seconds", 0.2)
    for _ in range(2):
        with pytest.raises(EmulatorError, match=message):
            emulator.launch(Kernel("undefined.cu", kernel, 2), (1,), (x, *args))


def test_arguments_are_checked() -> None:
    kernel = Kernel("threads.cu", "tree_sum_kernel", 32)
    x = emulator.zeros(32, np.float32)
    with pytest.raises(TypeError, match="takes 2 arguments, got 1"):
        emulator.launch(kernel, (1,), (x,))
    with pytest.raises(TypeError, match="argument 1 must be an array of float32, got float16"):
        emulator.launch(kernel, (1,), (x, x.astype(np.float16)))
    with pytest.raises(TypeError, match="on the emulated device, got ndarray"):
        emulator.launch(kernel, (1,), (x, np.asarray(x)))
    with pytest.raises(TypeError, match="argument 2 must be int32, got float32"):
        emulator.launch(Kernel("threads.cu", "outside_kernel", 1, 64), (1,), (x, 1, np.float32(2)))


def test_a_kernel_that_does_not_compile() -> None:
    with pytest.raises(EmulatorError, match="no_such_kernel"):
        emulator.launch(Kernel("threads.cu", "no_such_kernel", 1), (1,), ())


# ---- Arrays


def test_emulated_arrays() -> None:
    x = emulator.asarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    assert isinstance(x, EmulatedArray)
    assert isinstance(x[1:, 2], EmulatedArray)
    assert type(x).lorakit_backend is emulator
    assert x.ctypes.data % 256 == 0
    assert emulator.asarray(x) is x
    assert type(np.asarray(x)) is np.ndarray
    transposed = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)
    assert emulator.asarray(transposed).strides == transposed.strides
    np.testing.assert_array_equal(emulator.asarray(transposed), transposed)
    assert np.isnan(emulator.empty((2, 0, 3), np.float32)).shape == (2, 0, 3)
    assert np.isnan(emulator.empty(7, ml_dtypes.bfloat16).astype(np.float32)).all()
    assert emulator.error_word() is emulator.error_word()
