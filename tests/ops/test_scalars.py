"""Scalars of any integer type reach the kernels as the kernels declare them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorakit import ops
from lorakit.testing import assert_bitwise_equal, rotary_table
from tests.ops.helpers import FLOAT32, CacheCase

if TYPE_CHECKING:
    from tests.conftest import KernelDevice


@pytest.mark.parametrize("layer_idx", [np.int64(1), np.uint32(1), np.int8(1)], ids=repr)
def test_layer_idx_and_flags(
    layer_idx: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = CacheCase("", (2, 0), (3, 2), head_dim=16, dtype=FLOAT32)
    cache, q = case.cache(rng), case.rows(rng, 4)
    table = kernels.asarray(rotary_table(8, 8))
    k = case.rows(rng, case.n_kv_heads)

    def step(layer: Any, yes: Any, no: Any) -> list[Any]:
        offsets, place = case.place(kernels, cache)
        q_there, k_there = kernels.asarray(q), kernels.asarray(k)
        ops.store_kv(k_there, k_there, offsets, place, layer)
        ops.add_kv(k_there, k_there, offsets, place, layer)
        rotated = ops.rope_ragged(
            q_there, offsets, place, table, layer, interleaved=no, rotate_last=yes
        )
        again = ops.rope_store_kv(
            q_there, k_there, k_there, offsets, place, table, layer, interleaved=no, rotate_last=yes
        )
        assert_bitwise_equal(again, kernels.to_host(rotated))
        out = ops.attention_ragged(rotated, offsets, place, layer, causal=no)
        return [kernels.to_host(array) for array in (rotated, out, place.blocks)]

    for one, other in zip(step(layer_idx, 1, 0), step(1, True, False), strict=True):
        assert_bitwise_equal(one, other)


def test_products_over_no_columns_are_refused() -> None:
    x, a = np.zeros((2, 0), np.float32), np.zeros((1, 4, 0), np.float32)
    with pytest.raises(ValueError, match="x must have at least one column"):
        ops.sgmv_shrink(x, a, np.zeros(1, np.int32), None, np.array([0, 2], np.uint32))
