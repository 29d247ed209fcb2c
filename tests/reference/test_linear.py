"""The base product against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorakit.dtypes import STORAGE, float16
from lorakit.reference import linear
from lorakit.testing import activations, assert_bitwise_equal, assert_within_budget, widen

each_dtype = pytest.mark.parametrize("dtype", STORAGE, ids=str)

CASES = {
    "one-row": ((1, 64), 48),
    "primes": ((7, 131), 17),
    "one-output": ((5, 16), 1),
    "leading-axes": ((2, 3, 40), 24),
    "vector": ((40,), 24),
    "no-rows": ((0, 40), 24),
}


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@each_dtype
def test_linear_is_the_product_with_the_transposed_weight(
    dtype: Any, case: tuple[tuple[int, ...], int], with_bias: bool
) -> None:
    shape, out_dim = case
    rng = np.random.default_rng(0)
    x, weight = activations(shape, dtype, rng), activations((out_dim, shape[-1]), dtype, rng)
    bias = activations((out_dim,), dtype, rng) if with_bias else None
    exact = np.einsum("...k,nk->...n", widen(x), widen(weight))
    terms = np.einsum("...k,nk->...n", np.abs(widen(x)), np.abs(widen(weight)))
    if bias is not None:
        exact, terms = exact + widen(bias), terms + np.abs(widen(bias))
    y = linear(x, weight, bias)
    assert y.shape == (*shape[:-1], out_dim)
    assert_within_budget(y, exact, dtype, terms, length=shape[-1] + 1)


def test_worked_by_hand() -> None:
    x = np.array([[1, 2, 3]], np.float32)
    weight = np.array([[1, 1, 1], [1, 0, -1]], np.float32)
    y = linear(x, weight, np.array([0.5, 10], np.float32))
    np.testing.assert_array_equal(y, [[6.5, 8.0]])


def test_half_precision_is_summed_in_float32_and_rounded_once() -> None:
    # In float16, 2048 + 1 is 2048: a half-precision sum never gets away from 2048.
    x, weight = np.ones((1, 2052), float16), np.ones((1, 2052), float16)
    weight[0, 0] = 2048.0
    assert float(linear(x, weight)[0, 0]) == 4100.0  # 4099 to a multiple of 4
    # 2048 + 1.5 rounds to 2050; a product rounded before the bias is added would give 2048.
    y = linear(np.ones((1, 2), float16), np.array([[2048, 1]], float16), np.array([0.5], float16))
    assert float(y[0, 0]) == 2050.0


@each_dtype
def test_strided_inputs_give_the_values_of_contiguous_ones(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.integers(-8, 8, (6, 10)), rng.integers(-8, 8, (12, 10))
    y = linear(x.astype(dtype), weight.astype(dtype))
    strided = linear(np.repeat(x, 2, axis=1).astype(dtype)[:, ::2], weight.T.astype(dtype).T)
    assert_bitwise_equal(strided, y)
    np.testing.assert_array_equal(widen(y), x @ weight.T)
