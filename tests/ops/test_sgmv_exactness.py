"""How far segmented LoRA products are from exact ones: the bounds that `ops.sgmv_lora` states.

The other tests allow what any order of sums may lose, these what the kernels do. One of the arrays added to
is such that little is left of the result: then the error of the delta shows, which rounding would hide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit import ops
from lorakit.dtypes import bfloat16, ulp
from lorakit.testing import widen
from lorakit.testing.budget import UNIT_ROUNDOFF
from tests.ops.helpers import FLOAT16, FLOAT32, each_dtype, split_error

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

ROWS, OUT_DIM = 24, 72


class Problem:
    """Rows of two adapters and their exact delta, in float64."""

    def __init__(
        self, dtype: Any, in_dim: int, rank: int, positive: bool, rng: np.random.Generator
    ) -> None:
        def normal(*shape: int) -> NDArray[Any]:
            values = rng.standard_normal(shape)
            return np.abs(values) if positive else values

        self.x = normal(ROWS, in_dim).astype(dtype)
        self.a = (normal(2, rank, in_dim) / in_dim**0.5).astype(dtype)
        self.b = (normal(2, rank, OUT_DIM) / rank**0.5).astype(dtype)
        self.offsets = np.array([0, ROWS // 3, ROWS], np.int32)
        self.slots = np.array([1, 0], np.int32)

    def delta(self, sign: Any) -> NDArray[np.float64]:
        x, a, b = (sign(widen(values)) for values in (self.x, self.a, self.b))
        groups = zip(self.slots, self.offsets, self.offsets[1:], strict=False)
        return np.concatenate([x[i:j] @ a[s].T @ b[s] for s, i, j in groups])

    def run(self, kernels: KernelDevice, y: NDArray[Any]) -> NDArray[np.float64]:
        x, a, b = (kernels.asarray(values) for values in (self.x, self.a, self.b))
        y = kernels.asarray(y.copy())
        ops.sgmv_lora(x, a, b.transpose(0, 2, 1), self.slots, None, self.offsets, add_to=y)
        return widen(kernels.to_host(y))


@each_dtype
@pytest.mark.parametrize("y_float32", [False, True], ids=["", "to_float32"])
@pytest.mark.parametrize("positive", [False, True], ids=["any_sign", "positive"])
@pytest.mark.parametrize(
    ("in_dim", "rank"), [(64, 1), (4096, 1), (1032, 16), (4096, 128), (72, 512)]
)
def test_an_element(
    in_dim: int,
    rank: int,
    positive: bool,
    y_float32: bool,
    dtype: Any,
    kernels: KernelDevice,
    rng: np.random.Generator,
) -> None:
    """One unit in the last place, and c * 2**-24 of all that was added up.

    Tensor cores cut off what does not fit. With terms of either sign that evens out; of one sign it grows
    with the number of instructions in a row, one for 16 columns of up to 1024 and two for 16 ranks.
    """
    limit = 32 + rank / 4 if positive else 4
    if dtype == bfloat16:  # two of them in place of a float32 of the rank vector
        limit += split_error(dtype) / UNIT_ROUNDOFF
    problem = Problem(dtype, in_dim, rank, positive, rng)
    delta, y_dtype = problem.delta(np.positive), FLOAT32 if y_float32 else dtype
    for y in (-delta, rng.standard_normal(delta.shape), np.zeros_like(delta)):
        before = y.astype(y_dtype)
        exact = widen(before) + delta
        terms = np.abs(widen(before)) + problem.delta(np.abs)
        error = np.abs(problem.run(kernels, before) - exact)
        unit = 0.0 if y_dtype == FLOAT32 else ulp(exact, y_dtype)
        c = ((error - unit) / (UNIT_ROUNDOFF * terms)).max()
        assert c <= limit


@pytest.mark.parametrize("dtype", [FLOAT16, bfloat16], ids=str)
@pytest.mark.parametrize("base", ["normal", "zeros"])
@pytest.mark.parametrize(("in_dim", "rank"), [(64, 8), (1032, 16), (4096, 64)])
def test_all_elements(
    in_dim: int,
    rank: int,
    base: str,
    dtype: Any,
    kernels: KernelDevice,
    rng: np.random.Generator,
) -> None:
    """The norm of the error is that of rounding the exact result once, within 2 %.

    Rounding the rank vector, or the delta before it is added, would make it 1.4 times that.
    """
    problem = Problem(dtype, in_dim, rank, False, rng)
    delta = problem.delta(np.positive)
    before = (rng.standard_normal(delta.shape) * (base == "normal")).astype(dtype)
    exact = widen(before) + delta
    error = np.linalg.norm(problem.run(kernels, before) - exact)
    once = np.linalg.norm(widen(exact.astype(dtype)) - exact)
    assert once > 0
    assert error <= 1.02 * once
