"""linear: the base product, on the CPU and, where there is one, on the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorakit import Graph, cublas, ops
from lorakit.dtypes import bfloat16
from lorakit.testing import activations, assert_bitwise_equal, assert_within_budget, widen
from tests.ops.helpers import FLOAT16, FLOAT32, each_dtype

# name: rows, in_dim, out_dim, bias
SIZES = {
    "one_row": (1, 64, 40, False),
    "bias": (5, 64, 40, True),
    "primes": (7, 131, 67, True),
    "no_rows": (0, 64, 40, True),
    "no_outputs": (3, 64, 0, False),
    "k_300": (17, 300, 96, False),  # a budget far below what TF32 loses
    "split_k": (3, 16384, 16, False),  # sums in parts, which are not to be rounded
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def numbers(size: tuple[int, int, int, bool], dtype: Any, rng: np.random.Generator) -> list[Any]:
    rows, in_dim, out_dim, bias = size
    x, weight = activations((rows, in_dim), dtype, rng), activations((out_dim, in_dim), dtype, rng)
    return [x, weight, activations((out_dim,), dtype, rng) if bias else None]


def check(y: Any, x: Any, weight: Any, bias: Any) -> None:
    product = widen(x) @ widen(weight).T
    terms = np.abs(widen(x)) @ np.abs(widen(weight)).T
    exact = product if bias is None else product + widen(bias)
    terms = terms if bias is None else terms + np.abs(widen(bias))
    assert_within_budget(y, exact, x.dtype, terms, length=x.shape[1] + 1, largest64=np.abs(product))


@each_dtype
@each_size
def test_linear_on_the_cpu(
    size: tuple[int, int, int, bool], dtype: Any, rng: np.random.Generator
) -> None:
    arrays = numbers(size, dtype, rng)
    check(ops.linear(*arrays), *arrays)


@each_dtype
@each_size
def test_linear_on_the_gpu(
    size: tuple[int, int, int, bool], dtype: Any, gpu: Any, rng: np.random.Generator
) -> None:
    arrays = numbers(size, dtype, rng)
    x, weight, bias = arrays
    y = ops.linear(*(None if array is None else gpu.asarray(array) for array in arrays))
    check(y, x, weight, bias)


@pytest.mark.parametrize("dtype", [FLOAT16, bfloat16], ids=str)
def test_the_product_is_not_rounded_before_the_bias(dtype: Any, to_device: Any) -> None:
    """2049 + 1 is even for float16 only if 2049 was not rounded to 2048 first; likewise bfloat16."""
    odd = 2049 if dtype == FLOAT16 else 257
    x, weight = np.ones((1, 2), dtype), np.array([[odd - 1, 1]], dtype)
    y = ops.linear(*map(to_device, (x, weight, np.ones(1, dtype))))
    assert_bitwise_equal(y, np.array([[odd + 1]], dtype))


@each_dtype
def test_a_captured_product(dtype: Any, gpu: Any, rng: np.random.Generator) -> None:
    """Replays compute what a plain call does, and leave cuBLAS to others as it was."""
    x, weight, bias = numbers((9, 256, 72, True), dtype, rng)
    on_gpu = [gpu.asarray(array) for array in (x, weight, bias)]
    ops.linear(*on_gpu)
    with Graph() as graph:
        y = ops.linear(*on_gpu)
    for _ in range(2):
        x = activations(x.shape, dtype, rng)
        on_gpu[0][...] = gpu.asarray(x)
        y.fill(float("nan"))
        graph.replay()
        check(y, x, weight, bias)
        assert_bitwise_equal(y, ops.linear(*on_gpu))
    square = gpu.asarray(rng.standard_normal((64, 64)).astype(np.float32))
    np.testing.assert_allclose(
        (square @ square).get(), square.get().astype(np.float64) @ square.get(), atol=1e-3
    )


@each_dtype
def test_layouts(dtype: Any, to_device: Any, rng: np.random.Generator) -> None:
    """Rows of x apart; a weight that is contiguous along its columns, as one slot of B is."""
    x, weight, bias = numbers((6, 40, 24, True), dtype, rng)
    wide = to_device(np.concatenate([x, x], axis=1))
    columns = to_device(np.ascontiguousarray(weight.T)).T
    check(ops.linear(wide[:, 40:], columns, to_device(bias)), x, weight, bias)


def test_a_weight_without_runs_is_refused() -> None:
    x, weight = np.zeros((2, 4), np.float32), np.zeros((6, 8), np.float32)[::2, ::2]
    with pytest.raises(ValueError, match="weight must be contiguous along a row or a column"):
        ops.linear(x, weight)


@pytest.mark.parametrize("stride", [0, 4, 28])
def test_rows_that_overlap_are_refused(stride: int) -> None:
    x = np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), (4, 8), (stride, 4))
    with pytest.raises(ValueError, match=r"x must .*rows"):
        ops.linear(x, np.zeros((3, 8), np.float32))


def test_float32_does_not_use_tf32(gpu: Any, rng: np.random.Generator) -> None:
    """Not even when the handle was told to, which stays so: TF32 would round the inputs to 10 bits."""
    from cupy.cuda import cublas as cupy_cublas
    from cupy.cuda import device

    arrays = numbers((64, 256, 128, False), FLOAT32, rng)
    handle = device.get_cublas_handle()
    cupy_cublas.setMathMode(handle, 3)  # CUBLAS_TF32_TENSOR_OP_MATH
    try:
        y = ops.linear(*map(gpu.asarray, arrays[:2]))
        assert cupy_cublas.getMathMode(handle) == 3
    finally:
        cupy_cublas.setMathMode(handle, 0)
    check(y, *arrays)


def test_a_refusal_of_cublas_is_an_error(gpu: Any) -> None:
    with pytest.raises(RuntimeError, match="cuBLAS: "):
        cublas._check(7)  # CUBLAS_STATUS_INVALID_VALUE
