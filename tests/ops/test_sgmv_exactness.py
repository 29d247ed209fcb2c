"""How far segmented LoRA products are from exact ones: the bounds that `ops.sgmv_lora` states.

The other tests allow what any order of sums may lose, these what the kernels do. One of the arrays added to
is such that little is left of the result: then the error of the delta shows, which rounding would hide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit import ops, tiles
from lorakit.dtypes import bfloat16, ulp
from lorakit.testing import widen
from lorakit.testing.budget import UNIT_ROUNDOFF
from tests.ops.helpers import FLOAT16, FLOAT32, each_dtype, split_error

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

ROWS, OUT_DIM = 24, 72
SIZES = ((64, 1, 8), (4096, 1, 16), (1032, 16, 64), (4096, 128, 128), (72, 512, 64), (1032, 40, 8))
"""in_dim, rank, and rows of a work item, so that each kernel has a turn."""


class Problem:
    """Rows of two adapters with a bias, and their exact delta, in float64.

    Args:
        operands: ``normal``; ``positive``, those without their sign; ``heavy``, normal numbers of very
            different size; ``one_large``, where x and A begin with 1 and every other product is less than
            rounding drops.
    """

    def __init__(
        self, dtype: Any, in_dim: int, rank: int, operands: str, rng: np.random.Generator
    ) -> None:
        def draw(*shape: int) -> NDArray[Any]:
            values = rng.standard_normal(shape)
            if operands == "heavy":
                values *= np.exp(2 * rng.standard_normal(shape) - 3)
            return np.abs(values) if operands == "positive" else values

        x, a = draw(ROWS, in_dim), draw(2, rank, in_dim) / in_dim**0.5
        b = draw(2, rank, OUT_DIM) / rank**0.5
        if operands == "one_large":
            x[...], a[...], b[...] = 2.0**-10, 0.98 * 2.0**-14, 1.0
            x[:, 0], a[:, :, 0] = 1.0, 1.0
        self.x, self.a, self.b = (values.astype(dtype) for values in (x, a, b))
        self.bias = draw(2, OUT_DIM).astype(dtype) if operands in ("normal", "positive") else None
        self.offsets = np.array([0, ROWS // 3, ROWS], np.int32)
        self.slots = np.array([1, 0], np.int32)

    def delta(self, sign: Any) -> NDArray[np.float64]:
        x, a, b = (sign(widen(values)) for values in (self.x, self.a, self.b))
        bias = 0.0 * b[:, 0] if self.bias is None else sign(widen(self.bias))
        groups = zip(self.slots, self.offsets, self.offsets[1:], strict=False)
        return np.concatenate([x[i:j] @ a[s].T @ b[s] + bias[s] for s, i, j in groups])

    def run(self, kernels: KernelDevice, y: NDArray[Any]) -> NDArray[np.float64]:
        x, a, b = (kernels.asarray(values) for values in (self.x, self.a, self.b))
        y = kernels.asarray(y.copy())
        ops.sgmv_lora(
            x,
            a,
            b.transpose(0, 2, 1),
            self.slots,
            None,
            self.offsets,
            bias=None if self.bias is None else kernels.asarray(self.bias),
            add_to=y,
        )
        return widen(kernels.to_host(y))


@each_dtype
@pytest.mark.parametrize("y_float32", [False, True], ids=["", "to_float32"])
@pytest.mark.parametrize("operands", ["normal", "positive", "heavy", "one_large"])
@pytest.mark.parametrize(("in_dim", "rank", "item_rows"), SIZES)
def test_an_element(
    in_dim: int,
    rank: int,
    item_rows: int,
    operands: str,
    y_float32: bool,
    dtype: Any,
    kernels: KernelDevice,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """One unit in the last place, and c * 2**-24 of all that was added up.

    The most is two units for each addition in a row: tensor cores cut off, which is twice what rounding
    loses. Random numbers even most of it out, if they have either sign.
    """
    monkeypatch.setattr(tiles, "sgmv_item_rows", lambda *_: item_rows)
    problem = Problem(dtype, in_dim, rank, operands, rng)
    delta, y_dtype = problem.delta(np.positive), FLOAT32 if y_float32 else dtype
    most = 2 * (min(in_dim, 256) + 4 + -(-in_dim // 1024) + rank + 2)
    limit = {"normal": 4, "positive": 32 + rank / 4}.get(operands, most)
    limit += split_error(dtype) / UNIT_ROUNDOFF  # what two terms lose of the vector of the rank
    for y in (-delta, rng.standard_normal(delta.shape), np.zeros_like(delta)):
        before = y.astype(y_dtype)
        exact = widen(before) + delta
        terms = np.abs(widen(before)) + problem.delta(np.abs)
        assert np.isfinite(terms).all()
        error = np.abs(problem.run(kernels, before) - exact)
        unit = 0.0 if y_dtype == FLOAT32 else ulp(exact, y_dtype)
        c = ((error - unit) / (UNIT_ROUNDOFF * terms)).max()
        assert c <= limit


@pytest.mark.parametrize("dtype", [FLOAT16, bfloat16], ids=str)
@pytest.mark.parametrize("base", ["normal", "zeros"])
@pytest.mark.parametrize(("in_dim", "rank", "item_rows"), SIZES)
def test_all_elements(
    in_dim: int,
    rank: int,
    item_rows: int,
    base: str,
    dtype: Any,
    kernels: KernelDevice,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """The norm of the error is that of rounding the exact result once, within 2 %.

    Rounding the rank vector, or the delta before it is added, would make it 1.4 times that.
    """
    monkeypatch.setattr(tiles, "sgmv_item_rows", lambda *_: item_rows)
    problem = Problem(dtype, in_dim, rank, "normal", rng)
    delta = problem.delta(np.positive)
    before = (rng.standard_normal(delta.shape) * (base == "normal")).astype(dtype)
    exact = widen(before) + delta
    error = np.linalg.norm(problem.run(kernels, before) - exact)
    once = np.linalg.norm(widen(exact.astype(dtype)) - exact)
    assert once > 0
    assert error <= 1.02 * once
