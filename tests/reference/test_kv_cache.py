"""The cache writes against a loop over tokens; nothing else in the cache may change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.dtypes import STORAGE, bfloat16, float32
from lorakit.reference import add_kv, store_kv
from lorakit.testing import (
    PagedCache,
    activations,
    assert_bitwise_equal,
    paged_cache,
    row_offsets,
)
from tests.reference.dense import cached, new_places

each_dtype = pytest.mark.parametrize("dtype", STORAGE, ids=str)

# name: (cached before, new, page size)
CASES: dict[str, tuple[list[int], list[int], int]] = {
    "prefill": ([0, 0], [5, 9], 4),
    "decode": ([3, 16, 7, 0], [1, 1, 1, 1], 8),
    "across-pages": ([3], [10], 4),
    "page-filled-to-the-last-slot": ([5], [3], 4),
    "last-page-with-one-token": ([8], [1], 4),
    "page-size-1": ([2, 0], [3, 1], 1),
    "page-size-3": ([4, 2], [2, 5], 3),
    "a-sequence-without-new-tokens": ([4, 6, 0], [2, 0, 3], 4),
    "no-tokens": ([4, 0], [0, 0], 4),
    "no-sequences": ([], [], 4),
    "chunk": ([130], [70], 128),
}
each_case = pytest.mark.parametrize("name", CASES)


def build(name: str, dtype: Any, *, store_new: bool) -> tuple[PagedCache, NDArray[np.uint32]]:
    before, new, page_size = CASES[name]
    cache = paged_cache(
        before,
        new,
        page_size=page_size,
        n_kv_heads=2,
        head_dim=8,
        dtype=dtype,
        rng=np.random.default_rng(0),
        num_layers=3,
        layer_idx=2,
        store_new=store_new,
        other_layers=7.0,
    )
    return cache, row_offsets(new)


@each_case
@each_dtype
def test_store_copies_bits_to_the_positions_of_this_step_only(name: str, dtype: Any) -> None:
    cache, offsets = build(name, dtype, store_new=False)
    rng = np.random.default_rng(1)
    # One array [k | v], so that rows are strided as they are behind a fused projection.
    kv = activations((sum(CASES[name][1]), 2, 2, 8), dtype, rng)
    kv.reshape(-1)[::11] = np.nan
    kv.reshape(-1)[1::11] = -0.0
    expected = cache.blocks.copy()
    for row, page, slot in new_places(cache, offsets):
        expected[page, :, 2, slot] = kv[row]
    store_kv(kv[:, 0], kv[:, 1], offsets, cache, 2)
    assert_bitwise_equal(cache.blocks, expected)


@pytest.mark.parametrize("delta_dtype", ["same", "float32"])
@each_case
@each_dtype
def test_add_rounds_each_sum_once_and_touches_nothing_else(
    name: str, dtype: Any, delta_dtype: str
) -> None:
    cache, offsets = build(name, dtype, store_new=True)
    rng = np.random.default_rng(1)
    given = dtype if delta_dtype == "same" else float32
    k, v = (activations((sum(CASES[name][1]), 2, 8), given, rng) for _ in range(2))
    expected = cache.blocks.copy()
    for row, page, slot in new_places(cache, offsets):
        for part, delta in enumerate((k, v)):
            old = expected[page, part, 2, slot].astype(np.float32)
            expected[page, part, 2, slot] = (old + delta[row].astype(np.float32)).astype(dtype)
    add_kv(k, v, offsets, cache, 2)
    assert_bitwise_equal(cache.blocks, expected)


def test_store_worked_by_hand() -> None:
    # Sequence 0 has 1 token, in page 2; sequence 1 has none. Pages hold 2 tokens.
    blocks = np.zeros((4, 2, 1, 2, 1, 1), np.float32)
    cache = PagedCache(
        blocks,
        np.array([1, 0], np.uint32),
        np.array([[2, 0], [3, 9]], np.uint32),
        np.array([[2, 3]], np.uint32),
    )
    k = np.array([10, 11, 12], np.float32).reshape(3, 1, 1)
    store_kv(k, -k, np.array([0, 2, 3], np.uint32), cache, 0)
    keys = [[11, 0], [0, 0], [0, 10], [12, 0]]  # [page][slot]
    np.testing.assert_array_equal(blocks[:, 0, 0, :, 0, 0], keys)
    np.testing.assert_array_equal(blocks[:, 1, 0, :, 0, 0], np.negative(keys))


def test_add_rounds_a_float32_delta_together_with_the_sum() -> None:
    # 256 + (1 + 2**-9) is just above halfway to 258; the delta rounded to bfloat16 is 1, and
    # 257 would round to 256.
    cache = paged_cache(
        [0], [1], page_size=1, n_kv_heads=1, head_dim=1, dtype=bfloat16,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    cache.blocks[:] = 256.0
    delta = np.full((1, 1, 1), 1.0 + 2.0**-9, np.float32)
    add_kv(delta, delta, row_offsets([1]), cache, 0)
    assert sorted(set(cache.blocks.astype(np.float32).ravel().tolist())) == [256.0, 258.0]


@pytest.mark.parametrize("tail", [0, 1, 2, 3], ids=lambda n: f"from-sequence-{n}")
@each_dtype
def test_add_to_the_tail_of_a_batch_as_radd_does(dtype: Any, tail: int) -> None:
    """Ones, prompts of 10 to 40 on caches of 40 to 10: only the tail's new positions change."""
    before, new = [40, 30, 20, 10], [10, 20, 30, 40]
    rng = np.random.default_rng(2)
    cache = paged_cache(
        before, new, page_size=128, n_kv_heads=8, head_dim=128, dtype=dtype, rng=rng
    )
    cache.blocks[:] = 1.0
    offsets = row_offsets(new)[tail:]
    k, v = (rng.integers(1, 64, (sum(new[tail:]), 8, 128)).astype(dtype) for _ in range(2))
    add_kv(k, v, offsets, cache, 0, batch_offset=tail)

    row = 0
    for b in range(4):
        for part, delta in enumerate((k, v)):
            kept = cached(cache, part, 0, b, range(before[b]))
            assert (kept == 1).all()
            changed = cached(cache, part, 0, b, range(before[b], before[b] + new[b]))
            added = delta[row : row + new[b]].astype(np.float32) if b >= tail else 0.0
            np.testing.assert_array_equal(
                changed.astype(np.float32), np.ones(changed.shape, np.float32) + added
            )
        row += new[b] if b >= tail else 0
    touched = np.count_nonzero((cache.blocks.astype(np.float32) != 1).any(axis=(-1, -2)))
    assert touched == 2 * sum(new[tail:])


def test_int32_metadata_is_taken_as_well() -> None:
    cache, offsets = build("across-pages", np.float32, store_new=False)
    other = PagedCache(
        cache.blocks.copy(),
        cache.cache_lengths.astype(np.int32),
        cache.lookup_table.astype(np.int32),
        cache.max_lengths,
    )
    k = activations((10, 2, 8), np.float32, np.random.default_rng(3))
    store_kv(k, k, offsets, cache, 2)
    store_kv(k, k, offsets.astype(np.int32), other, 2)
    assert_bitwise_equal(other.blocks, cache.blocks)
