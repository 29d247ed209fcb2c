"""The LoRA references against merged weights, row by row, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.dtypes import STORAGE, bfloat16
from lorakit.reference import sgmv_expand, sgmv_lora, sgmv_qkv_lora, sgmv_shrink
from lorakit.testing import (
    activations,
    adapters,
    assert_bitwise_equal,
    assert_within_budget,
    lora_batch,
    paged_cache,
    row_offsets,
    widen,
)
from tests.reference.dense import adapter_of_rows, bits, new_places

each_dtype = pytest.mark.parametrize("dtype", STORAGE, ids=str)

# name: (lengths of the groups, slot of each, max rank, in_dim, out_dim, rows after the last group)
CASES: dict[str, tuple[list[int], list[int], int, int, int, int]] = {
    "one-group": ([16], [0], 16, 128, 64, 0),
    "one-adapter-three-groups": ([8, 12, 10], [0, 0, 0], 16, 128, 256, 0),
    "four-adapters": ([80, 120, 100, 140], [0, 1, 2, 3], 8, 256, 64, 0),
    "base-at-the-end": ([18, 10, 12, 8, 10, 12], [0, 0, 0, -1, -1, -1], 16, 128, 64, 0),
    "adapters-and-base": ([18, 10, 12, 14, 8, 10], [0, 1, 2, 1, -1, -1], 16, 256, 64, 0),
    "base-between": ([3, 5, 2], [2, -1, 0], 4, 17, 13, 0),
    "any-negative-is-base": ([2, 3], [-7, 1], 4, 16, 8, 0),
    "empty-groups": ([0, 4, 0, 3, 0], [1, 0, 3, 2, -1], 8, 31, 7, 0),
    "all-base": ([5, 6], [-1, -1], 8, 16, 16, 0),
    "rows-after-the-last-group": ([4, 3], [1, 2], 8, 16, 24, 5),
    "only-rows-after": ([], [], 8, 16, 24, 5),
    "one-token": ([1], [3], 5, 24, 40, 0),
    "rank-1": ([3, 4], [0, 2], 1, 33, 9, 0),
    "no-tokens": ([0], [1], 8, 16, 24, 0),
    "no-groups-no-tokens": ([], [], 8, 16, 24, 0),
}


class Case:
    """Inputs of one case, with nan in everything that a slot's true rank does not reach."""

    def __init__(self, name: str, dtype: Any, seed: int = 0) -> None:
        lengths, ids, max_rank, in_dim, out_dim, extra = CASES[name]
        rng = np.random.default_rng(seed)
        self.dtype, self.rows, self.max_rank = dtype, sum(lengths) + extra, max_rank
        self.x = activations((self.rows, in_dim), dtype, rng)
        self.adapters = adapters(4, max_rank, in_dim, out_dim, dtype, rng, poison=True)
        self.ids = np.array(ids, np.int32)
        self.ranks = self.adapters.slot_ranks[np.maximum(self.ids, 0)].astype(np.uint32)
        self.offsets = row_offsets(lengths)
        self.groups = (self.ids, self.ranks, self.offsets)
        self.of_rows = adapter_of_rows(
            self.rows, max_rank, *self.groups, slot_ranks=self.adapters.slot_ranks
        )

    def delta(self, absolute: bool = False) -> NDArray[np.float64]:
        """``x[t] @ (B A)[slot].T``, row by row; ``absolute`` gives the sum of |terms|."""
        size = np.abs if absolute else np.asarray
        out = np.zeros((self.rows, self.adapters.lora_b.shape[1]))
        for row, found in enumerate(self.of_rows):
            if found is not None:
                slot, rank = found
                b = size(widen(self.adapters.lora_b[slot, :, :rank]))
                merged = b @ size(widen(self.adapters.lora_a[slot, :rank]))
                out[row] = merged @ size(widen(self.x[row]))
        return out


@pytest.mark.parametrize("name", CASES)
@each_dtype
def test_shrink_is_the_product_with_a_of_each_row(name: str, dtype: Any) -> None:
    case = Case(name, dtype)
    a = widen(case.adapters.lora_a)
    exact, terms = np.zeros((2, case.rows, case.max_rank))
    for row, found in enumerate(case.of_rows):
        for r in range(0 if found is None else found[1]):
            products = widen(case.x[row]) * a[found[0], r] if found else np.zeros(1)
            exact[row, r], terms[row, r] = products.sum(), np.abs(products).sum()
    h = sgmv_shrink(case.x, case.adapters.lora_a, *case.groups)
    assert_within_budget(h, exact, np.float32, terms, length=1)
    assert_bitwise_equal(h[exact == 0], np.zeros(np.count_nonzero(exact == 0), np.float32))


@pytest.mark.parametrize("name", CASES)
@each_dtype
def test_lora_is_the_product_with_the_merged_weight(name: str, dtype: Any) -> None:
    case = Case(name, dtype)
    y = sgmv_lora(case.x, case.adapters.lora_a, case.adapters.lora_b, *case.groups)
    assert_within_budget(y, case.delta(), dtype, case.delta(absolute=True), length=1)
    base = [found is None for found in case.of_rows]
    assert not bits(y[base]).any()


@pytest.mark.parametrize("name", CASES)
@each_dtype
def test_lora_adds_in_place_and_leaves_base_rows_alone(name: str, dtype: Any) -> None:
    case = Case(name, dtype)
    old = activations((case.rows, case.adapters.lora_b.shape[1]), dtype, np.random.default_rng(1))
    base = [found is None for found in case.of_rows]
    old[base] = -0.0  # a base row that is written to becomes +0
    y = old.copy()
    returned = sgmv_lora(case.x, case.adapters.lora_a, case.adapters.lora_b, *case.groups, add_to=y)
    assert returned is y
    terms = np.abs(widen(old)) + case.delta(absolute=True)
    assert_within_budget(y, widen(old) + case.delta(), dtype, terms, length=1)
    assert_bitwise_equal(y[base], old[base])


@each_dtype
def test_expand_is_the_product_with_b_at_the_smallest_of_the_three_ranks(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    full = adapters(3, 8, 16, 12, dtype, rng, ranks=[8, 8, 8])
    h = activations((9, 8), np.float32, rng)
    ids, offsets = np.array([0, 1, 2], np.int32), row_offsets([3, 3, 3])
    lora_ranks = np.array([8, 3, 6], np.uint32)
    slot_ranks = np.array([5, 8, 0], np.int32)
    y = sgmv_expand(h, full.lora_b, ids, lora_ranks, offsets, slot_ranks=slot_ranks)
    exact = np.zeros((9, 12))
    for row in range(9):
        rank = [5, 3, 0][row // 3]
        exact[row] = widen(full.lora_b[row // 3, :, :rank]) @ widen(h[row, :rank])
    assert_within_budget(y, exact, dtype)
    assert not bits(y[6:]).any()
    # None is no bound at all.
    whole = sgmv_expand(h, full.lora_b, ids, None, offsets)
    assert_within_budget(whole[:3], widen(h[:3]) @ widen(full.lora_b[0]).T, dtype)


@each_dtype
def test_true_ranks_give_the_zero_padded_product_bit_for_bit(dtype: Any) -> None:
    x = activations((12, 20), dtype, np.random.default_rng(3))
    batch = lora_batch("uniform", 12, 4, np.random.default_rng(4), slot_ranks=8)
    padded, poisoned = (
        adapters(4, 8, 20, 10, dtype, np.random.default_rng(5), poison=poison)
        for poison in (False, True)
    )
    assert np.isnan(widen(poisoned.lora_a)).any()
    assert np.isnan(widen(poisoned.lora_b)).any()
    assert_bitwise_equal(
        sgmv_lora(x, padded.lora_a, padded.lora_b, *batch.metadata),
        sgmv_lora(
            x,
            poisoned.lora_a,
            poisoned.lora_b,
            *batch.metadata,
            slot_ranks=poisoned.slot_ranks,
        ),
    )


@each_dtype
def test_bias_is_added_once_to_rows_with_an_adapter_even_at_rank_0(dtype: Any) -> None:
    case = Case("adapters-and-base", dtype)
    ranks = case.ranks.copy()
    ranks[1] = 0
    y = sgmv_lora(
        case.x,
        case.adapters.lora_a,
        case.adapters.lora_b,
        case.ids,
        ranks,
        case.offsets,
        bias=case.adapters.bias,
    )
    exact, terms = case.delta(), case.delta(absolute=True)
    exact[18:28] = 0.0
    for row, found in enumerate(case.of_rows):
        if found is not None:
            exact[row] += widen(case.adapters.bias[found[0]])
    assert_within_budget(y, exact, dtype, terms + np.abs(exact), length=1)
    assert_bitwise_equal(y[18:28], np.tile(case.adapters.bias[1], (10, 1)))
    assert not bits(y[62:]).any()


def test_worked_by_hand() -> None:
    x = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    a = np.array([[[1, 1], [1, -1]]], np.float32)  # x A^T = (x0 + x1, x0 - x1)
    b = np.array([[[1, 0], [0, 1], [10, 100]]], np.float32)
    groups = (np.array([-1, 0], np.int32), np.array([0, 2], np.uint32), row_offsets([1, 2]))
    np.testing.assert_array_equal(sgmv_shrink(x, a, *groups), [[0, 0], [7, -1], [11, -1]])
    expected = [[0, 0, 0], [7, -1, -30], [11, -1, 10]]
    np.testing.assert_array_equal(sgmv_lora(x, a, b, *groups), expected)


def test_expand_rounds_the_sum_once() -> None:
    # 256 + (1 + 2**-9) is just above halfway to 258; with the delta rounded first it is halfway
    # exactly and would fall back to 256.
    h = np.array([[1.0, 2.0**-9]], np.float32)
    b = np.ones((1, 1, 2), bfloat16)
    y = np.array([[256.0]], bfloat16)
    groups = (np.array([0], np.int32), None, row_offsets([1]))
    assert float(sgmv_expand(h, b, *groups, add_to=y)[0, 0]) == 258.0


def test_the_rank_vector_is_not_rounded_to_the_storage_dtype() -> None:
    # A x = 1 + 2**-9 needs 10 bits; what is left after subtracting the 1 shows whether they stay.
    x = np.array([[1.0, 2.0**-9, 1.0]], bfloat16)
    a = np.array([[[1, 1, 0], [0, 0, -1]]], bfloat16)
    b = np.ones((1, 1, 2), bfloat16)
    groups = (np.array([0], np.int32), None, row_offsets([1]))
    assert float(sgmv_lora(x, a, b, *groups)[0, 0]) == 2.0**-9


@pytest.mark.parametrize("add_dtype", [*STORAGE], ids=str)
def test_the_result_has_the_dtype_of_the_array_that_is_added_to(add_dtype: Any) -> None:
    case = Case("four-adapters", bfloat16)
    y = np.zeros((case.rows, 64), add_dtype)
    sgmv_lora(case.x, case.adapters.lora_a, case.adapters.lora_b, *case.groups, add_to=y)
    assert_within_budget(y, case.delta(), add_dtype, case.delta(absolute=True), length=1)


def test_strided_rows_and_int32_metadata_give_the_same_bits() -> None:
    case = Case("adapters-and-base", np.float32)
    wide = np.full((case.rows, 3, 256), np.nan, np.float32)
    wide[:, 1] = case.x
    out = np.zeros((case.rows, 100), np.float32)
    y = sgmv_lora(case.x, case.adapters.lora_a, case.adapters.lora_b, *case.groups)
    sgmv_lora(
        wide[:, 1],
        case.adapters.lora_a,
        np.ascontiguousarray(case.adapters.lora_b),
        case.ids,
        case.ranks.astype(np.int32),
        case.offsets.astype(np.int32),
        add_to=out[:, 20:84],
    )
    assert_bitwise_equal(out[:, 20:84], y)
    assert not out[:, :20].any()
    assert not out[:, 84:].any()


def test_float64_inputs_are_not_rounded() -> None:
    rng = np.random.default_rng(6)
    x, a, b = (rng.standard_normal(s) for s in ((5, 40), (2, 4, 40), (2, 9, 4)))
    groups = (np.array([1, 0], np.int32), None, row_offsets([2, 3]))
    y = sgmv_lora(x, a, b, *groups)
    assert y.dtype == np.float64
    expected = np.concatenate([x[:2] @ (b[1] @ a[1]).T, x[2:] @ (b[0] @ a[0]).T])
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ids", "new", "before"),
    [
        ([0], [24], [0]),
        ([0, 1, 2, 1], [5, 7, 1, 3], [6, 0, 15, 16]),
        ([2, -1, 0, -1], [4, 3, 0, 6], [3, 9, 2, 1]),
        ([-1, -1], [4, 1], [0, 8]),
    ],
    ids=["one-adapter", "several-adapters", "mixed-with-base", "all-base"],
)
@each_dtype
def test_qkv_returns_q_and_adds_k_and_v_into_the_cache_once_rounded(
    dtype: Any, ids: list[int], new: list[int], before: list[int]
) -> None:
    rng = np.random.default_rng(7)
    rank, hidden, kv_heads, head_dim = 8, 96, 4, 16
    out_dims = (256, 64, 64)
    parts = [  # a slot's ranks differ between q, k and v
        adapters(3, rank, hidden, n, dtype, rng, poison=True, ranks=np.roll([8, 5, 1], i))
        for i, n in enumerate(out_dims)
    ]
    cache = paged_cache(
        before,
        new,
        page_size=4,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        rng=rng,
        num_layers=3,
        layer_idx=1,
        other_layers=1.5,
    )
    old = cache.copy()
    offsets = row_offsets(new)
    x = activations((sum(new), hidden), dtype, rng)
    lora_ids = np.array(ids, np.int32)
    q = sgmv_qkv_lora(
        x,
        [part.lora_a for part in parts],
        [part.lora_b for part in parts],
        lora_ids,
        np.full(len(ids), rank, np.uint32),
        offsets,
        offsets,
        cache,
        1,
        slot_ranks=[part.slot_ranks for part in parts],
        bias=[part.bias for part in parts],
    )

    exact = [np.zeros((len(x), n)) for n in out_dims]
    terms = [np.zeros((len(x), n)) for n in out_dims]
    row_ids = np.repeat(lora_ids, new).tolist()
    for row, slot in enumerate(row_ids):
        for i, part in enumerate(parts):
            if slot >= 0:
                bias = widen(part.bias[slot])
                exact[i][row] = part.delta_weight(slot) @ widen(x[row]) + bias
                r = part.slot_ranks[slot]
                inner = np.abs(widen(part.lora_a[slot, :r])) @ np.abs(widen(x[row]))
                terms[i][row] = np.abs(widen(part.lora_b[slot, :, :r])) @ inner + np.abs(bias)
    assert q.dtype == dtype
    assert_within_budget(q, exact[0], dtype, terms[0], length=1, name="q")

    untouched: Any = np.ones(cache.blocks.shape[:4], bool)
    for row, page, place in new_places(cache, offsets):
        for i in (0, 1):
            before_row = widen(old.blocks[page, i, 1, place]).reshape(-1)
            assert_within_budget(
                cache.blocks[page, i, 1, place].reshape(-1),
                before_row + exact[1 + i][row],
                dtype,
                np.abs(before_row) + terms[1 + i][row],
                length=1,
                name="kv"[i],
            )
            if row_ids[row] >= 0:
                untouched[page, i, 1, place] = False
    assert_bitwise_equal(cache.blocks[untouched], old.blocks[untouched])


def test_qkv_leaves_minus_zero_of_base_rows_in_the_cache() -> None:
    rng = np.random.default_rng(8)
    part = adapters(1, 2, 8, 8, np.float32, rng)
    cache = paged_cache([0], [2], page_size=2, n_kv_heads=1, head_dim=8, dtype=np.float32, rng=rng)
    cache.blocks[:] = -0.0
    groups = (np.array([-1], np.int32), np.array([0], np.uint32), row_offsets([1]))
    sgmv_qkv_lora(
        np.ones((2, 8), np.float32),
        [part.lora_a] * 3,
        [part.lora_b] * 3,
        *groups,
        row_offsets([2]),
        cache,
        0,
    )
    assert np.signbit(cache.blocks).all()


def test_qkv_of_an_empty_batch_does_nothing() -> None:
    rng = np.random.default_rng(9)
    part = adapters(1, 2, 8, 8, np.float32, rng)
    cache = paged_cache([3], [0], page_size=2, n_kv_heads=1, head_dim=8, dtype=np.float32, rng=rng)
    old = cache.copy()
    q = sgmv_qkv_lora(
        np.zeros((0, 8), np.float32),
        [part.lora_a] * 3,
        [part.lora_b] * 3,
        np.array([0], np.int32),
        None,
        row_offsets([0]),
        row_offsets([0]),
        cache,
        0,
    )
    assert q.shape == (0, 8)
    assert_bitwise_equal(cache.blocks, old.blocks)
