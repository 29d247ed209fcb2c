"""The rotation against complex multiplication."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.dtypes import STORAGE
from lorakit.reference import rope_ragged
from lorakit.testing import (
    PagedCache,
    activations,
    assert_bitwise_equal,
    assert_within_budget,
    paged_cache,
    rope_terms,
    rotary_table,
    row_offsets,
    widen,
)
from tests.reference.dense import cached, new_places

each_dtype = pytest.mark.parametrize("dtype", STORAGE, ids=str)
LAYOUTS = [
    pytest.param(True, False, id="interleaved-first"),
    pytest.param(True, True, id="interleaved-last"),
    pytest.param(False, False, id="halves-first"),
    pytest.param(False, True, id="halves-last"),
]
each_layout = pytest.mark.parametrize(("interleaved", "rotate_last"), LAYOUTS)

# name: (cached before, new, page size, head_dim, rotary_dim)
CASES: dict[str, tuple[list[int], list[int], int, int, int]] = {
    "prefill": ([0, 0], [5, 9], 4, 16, 16),
    "decode": ([3, 16, 7, 0], [1, 1, 1, 1], 8, 16, 16),
    "across-pages": ([3], [10], 4, 8, 8),
    "page-size-1": ([2, 0], [3, 1], 1, 16, 16),
    "a-sequence-without-new-tokens": ([4, 6, 0], [2, 0, 3], 4, 16, 16),
    "no-tokens": ([4], [0], 4, 16, 16),
    "head-dim-128": ([30], [3], 16, 128, 128),
    "head-dim-72-half-rotated": ([2, 5], [3, 2], 4, 72, 36),
    "one-pair": ([1], [4], 4, 8, 2),
}
each_case = pytest.mark.parametrize("name", CASES)


class Case:
    """Queries, a cache with unrotated keys in layer 1 of 2, and a table with no row to spare."""

    def __init__(self, name: str, dtype: Any) -> None:
        before, new, page_size, self.head_dim, rotary_dim = CASES[name]
        rng = np.random.default_rng(0)
        self.offsets = row_offsets(new)
        self.cache = paged_cache(
            before,
            new,
            page_size=page_size,
            n_kv_heads=2,
            head_dim=self.head_dim,
            dtype=dtype,
            rng=rng,
            num_layers=2,
            layer_idx=1,
            other_layers=7.0,
        )
        self.q = activations((sum(new), 6, self.head_dim), dtype, rng)
        self.table = rotary_table(max(b + n for b, n in zip(before, new, strict=True)), rotary_dim)
        self.positions = [b + i for b, n in zip(before, new, strict=True) for i in range(n)]


def pairs(
    head_dim: int, rotary_dim: int, interleaved: bool, rotate_last: bool
) -> list[tuple[int, int]]:
    """The elements of each rotated pair, in the order of the table."""
    first = head_dim - rotary_dim if rotate_last else 0
    if interleaved:
        return [(first + 2 * j, first + 2 * j + 1) for j in range(rotary_dim // 2)]
    return [(first + j, first + j + rotary_dim // 2) for j in range(rotary_dim // 2)]


def turned(
    head: NDArray[Any], row: NDArray[Any], where: list[tuple[int, int]]
) -> NDArray[np.float64]:
    """Each pair of ``head [head_dim]`` as a complex number times ``cos + i sin`` of ``row``."""
    out = widen(head)
    for j, (re, im) in enumerate(where):
        factor = complex(float(row[2 * j]), float(row[2 * j + 1]))
        product = complex(float(head[re]), float(head[im])) * factor
        out[re], out[im] = product.real, product.imag
    return out


@each_layout
@each_case
@each_dtype
def test_rotation_is_a_complex_product_by_position(
    dtype: Any, name: str, interleaved: bool, rotate_last: bool
) -> None:
    case = Case(name, dtype)
    layout = {"interleaved": interleaved, "rotate_last": rotate_last}
    where = pairs(case.head_dim, case.table.shape[1], interleaved, rotate_last)
    old_q, old = case.q.copy(), case.cache.copy()
    q_terms, k_terms = rope_terms(case.q, case.offsets, case.cache, case.table, 1, **layout)
    out = rope_ragged(case.q, case.offsets, case.cache, case.table, 1, **layout)

    exact_q, exact_blocks = widen(old_q), widen(old.blocks)
    places = new_places(case.cache, case.offsets)
    for (row, page, slot), position in zip(places, case.positions, strict=True):
        for head in range(6):
            exact_q[row, head] = turned(old_q[row, head], case.table[position], where)
        for head in range(2):
            key = old.blocks[page, 0, 1, slot, head]
            exact_blocks[page, 0, 1, slot, head] = turned(key, case.table[position], where)
    assert_within_budget(out, exact_q, dtype, q_terms, length=2, name="q")
    assert_within_budget(case.cache.blocks, exact_blocks, dtype, k_terms, length=2, name="k")

    assert_bitwise_equal(case.q, old_q, "the argument q")
    kept = sorted(set(range(case.head_dim)) - {i for pair in where for i in pair})
    assert_bitwise_equal(out[..., kept], old_q[..., kept], "unrotated elements")
    rotated = np.zeros(old.blocks.shape, bool)
    for _, page, slot in places:
        rotated[page, 0, 1, slot] = True
    rotated[..., kept] = False
    assert_bitwise_equal(case.cache.blocks[~rotated], old.blocks[~rotated], "the rest of the cache")


def test_worked_by_hand() -> None:
    # Position 0 keeps, position 1 turns the first pair by 90 degrees and the second by 180.
    table = np.array([[1, 0, 1, 0], [0, 1, -1, 0]], np.float32)
    q = np.array([[[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]]], np.float32)
    cache = paged_cache(
        [0], [2], page_size=2, n_kv_heads=1, head_dim=5, dtype=np.float32,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    for interleaved, rotate_last, expected in [
        (True, False, [-2, 1, -3, -4, 5]),
        (False, False, [-3, -2, 1, -4, 5]),
        (True, True, [1, -3, 2, -4, -5]),
        (False, True, [1, -4, -3, 2, -5]),
    ]:
        out = rope_ragged(
            q,
            row_offsets([2]),
            cache.copy(),
            table,
            0,
            interleaved=interleaved,
            rotate_last=rotate_last,
        )
        np.testing.assert_array_equal(out, [[[1, 2, 3, 4, 5]], [expected]])


@each_layout
@each_dtype
def test_position_0_is_the_identity(dtype: Any, interleaved: bool, rotate_last: bool) -> None:
    rng = np.random.default_rng(1)
    cache = paged_cache([0, 0], [1, 1], page_size=4, n_kv_heads=2, head_dim=8, dtype=dtype, rng=rng)
    old = cache.copy()
    q = activations((2, 4, 8), dtype, rng)
    out = rope_ragged(
        q,
        row_offsets([1, 1]),
        cache,
        rotary_table(1, 8),
        0,
        interleaved=interleaved,
        rotate_last=rotate_last,
    )
    assert_bitwise_equal(out, q)
    assert_bitwise_equal(cache.blocks, old.blocks)


@each_layout
def test_rotation_keeps_norms_and_scores_depend_on_distance_only(
    interleaved: bool, rotate_last: bool
) -> None:
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((2, 1, 16))
    # float64 pairs of exactly unit length, so that nothing but the rotation is measured
    angles = np.outer(np.arange(64), 100.0 ** (-np.arange(6) / 6))
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(64, 12)

    def at(position: int, vector: NDArray[Any]) -> NDArray[Any]:
        empty = PagedCache(
            np.zeros((64, 2, 1, 1, 1, 16)),
            np.array([position], np.uint32),
            np.arange(64, dtype=np.uint32)[np.newaxis],
            np.array([[1, 64]], np.uint32),
        )
        out: NDArray[Any] = rope_ragged(
            vector[np.newaxis],
            row_offsets([1]),
            empty,
            table,
            0,
            interleaved=interleaved,
            rotate_last=rotate_last,
        )
        return np.asarray(out[0, 0])

    for position in (0, 1, 17, 63):
        np.testing.assert_allclose(
            np.linalg.norm(at(position, vectors[0])), np.linalg.norm(vectors[0]), rtol=1e-12
        )
    scores = [at(p + 9, vectors[0]) @ at(p, vectors[1]) for p in (0, 5, 50)]
    np.testing.assert_allclose(scores[1:], scores[0], rtol=1e-10)
    assert not np.isclose(at(8, vectors[0]) @ at(0, vectors[1]), scores[0])


def test_strided_queries_give_a_new_contiguous_result() -> None:
    case = Case("across-pages", np.float32)
    wide = np.full((10, 8, 8), np.nan, np.float32)
    wide[:, 1:7] = case.q
    other = case.cache.copy()
    expected = rope_ragged(case.q, case.offsets, case.cache, case.table, 1)
    out = rope_ragged(wide[:, 1:7], case.offsets, other, case.table, 1)
    assert out.flags.c_contiguous
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(other.blocks, case.cache.blocks)


def test_rows_past_the_last_offset_are_copied() -> None:
    case = Case("prefill", np.float32)
    q = np.concatenate([case.q, case.q[:2]])
    out = rope_ragged(q, case.offsets, case.cache, case.table, 1)
    assert_bitwise_equal(out[14:], q[14:])
    assert not np.array_equal(out[1:14], q[1:14])


def test_chunks_rotate_each_key_once() -> None:
    rng = np.random.default_rng(3)
    whole = paged_cache([0], [9], page_size=4, n_kv_heads=1, head_dim=8, dtype=np.float32, rng=rng)
    chunked, table = whole.copy(), rotary_table(9, 8)
    q = activations((9, 2, 8), np.float32, rng)
    expected = rope_ragged(q, row_offsets([9]), whole, table, 0)
    for start, stop in [(0, 4), (4, 5), (5, 9)]:
        step = PagedCache(
            chunked.blocks,
            np.array([start], np.uint32),
            chunked.lookup_table,
            chunked.max_lengths,
        )
        out = rope_ragged(q[start:stop], row_offsets([stop - start]), step, table, 0)
        assert_bitwise_equal(out, expected[start:stop])
    assert_bitwise_equal(cached(chunked, 0, 0, 0, range(9)), cached(whole, 0, 0, 0, range(9)))
