"""Edges that the listed cases do not reach: the first element, a full table, an extreme number."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorakit import ops, reference
from lorakit.dtypes import bfloat16
from lorakit.testing import assert_bitwise_equal, assert_within_budget, rotary_table, widen
from tests.ops.helpers import FLOAT16, FLOAT32, CacheCase, each_dtype, split_error

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

ONE_GROUP = (np.array([0], np.int32), None)


# ---- The rank vector ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 5, 16, 23])
def test_each_rank_can_be_the_largest(rank: int, kernels: KernelDevice) -> None:
    """Row r has its only large element, beyond float16, at rank r; float16 products are scaled by it."""
    h = np.ones((rank, rank), np.float32) + np.eye(rank, dtype=np.float32) * (2.0**24 - 1)
    b = np.full((1, rank, 8), 2.0**-14, FLOAT16)
    y = ops.sgmv_expand(
        kernels.asarray(h),
        kernels.asarray(b).transpose(0, 2, 1),
        *ONE_GROUP,
        np.array([0, rank], np.int32),
    )
    # The ones are lost beside 2**24 when two float16 numbers carry it: 2**-22 of it.
    np.testing.assert_allclose(kernels.to_host(y).astype(np.float64), 1024.0, rtol=2.0**-10)


@pytest.mark.parametrize("magnitude", [2.0**-120, 2.0**-100, 2.0**60, 2.0**110])
@each_dtype
def test_rank_vectors_at_the_ends_of_float32(
    magnitude: float, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    h = (rng.uniform(1, 2, (3, 5)) * magnitude).astype(np.float32)
    b = rng.uniform(1, 2, (1, 5, 8)).astype(dtype)
    y = ops.sgmv_expand(
        kernels.asarray(h),
        kernels.asarray(b).transpose(0, 2, 1),
        *ONE_GROUP,
        np.array([0, 3], np.int32),
        add_to=kernels.asarray(np.zeros((3, 8), np.float32)),
    )
    exact = widen(h) @ widen(b[0])
    assert_within_budget(
        y, exact, np.float32, exact, length=5, propagated64=split_error(dtype) * exact
    )


@each_dtype
def test_infinity_stays_infinity(dtype: Any, kernels: KernelDevice) -> None:
    """And so does what overflows the 16-bit term that carries it."""
    largest = np.finfo(np.float32).max if np.dtype(dtype) == bfloat16 else np.inf
    h = np.array([[np.inf, 1], [1, -np.inf], [largest, 0], [0, 0], [np.inf, -3]], np.float32)
    b = np.ones((1, 2, 8), dtype)
    y = ops.sgmv_expand(
        kernels.asarray(h),
        kernels.asarray(b).transpose(0, 2, 1),
        *ONE_GROUP,
        np.array([0, 5], np.int32),
    )
    column = np.array([np.inf, -np.inf, np.inf, 0, np.inf])
    assert_bitwise_equal(y, np.tile(column[:, np.newaxis], 8).astype(dtype))


# ---- The cache ---------------------------------------------------------------------------------------


def at_the_start(case: CacheCase, rng: np.random.Generator) -> Any:
    """A cache of one layer whose first sequence begins on page 0, and whose table is full to the end."""
    cache = case.cache(rng)
    pages = -(-(case.cached[0] + case.new[0]) // case.page_size)
    order = [page for page in cache.lookup_table[0, :pages] if page]
    blocks = cache.blocks[[*cache.lookup_table[0, :pages], *order]]
    return replace(cache, blocks=blocks, lookup_table=np.arange(pages, dtype=np.uint32)[np.newaxis])


@pytest.mark.parametrize("op", ["store", "add", "rope", "rope_store", "attention"])
@each_dtype
def test_the_first_element_of_the_cache_and_the_last_place_of_the_table(
    op: str, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = CacheCase(
        "", (0,), (8,), page_size=4, n_heads=2, n_kv_heads=1, num_layers=1, layer_idx=0, dtype=dtype
    )
    cache = at_the_start(case, rng)
    offsets, on_device = case.place(kernels, cache)
    rows = case.rows(rng, 1)
    new = kernels.asarray(rows)
    expected = cache.copy()
    if op in ("store", "add"):
        getattr(ops, f"{op}_kv")(new, new, offsets, on_device, 0)
        getattr(reference, f"{op}_kv")(rows, rows, case.offsets(), expected, 0)
        assert_bitwise_equal(on_device.blocks, expected.blocks)
    elif op in ("rope", "rope_store"):
        table = rotary_table(8, 64)
        where, exact_where = (offsets, on_device), (case.offsets(), expected)
        if op == "rope":
            ops.rope_ragged(new, *where, kernels.asarray(table), 0)
            reference.rope_ragged(rows, *exact_where, table, 0)
        else:
            ops.rope_store_kv(new, new, new, *where, kernels.asarray(table), 0)
            reference.rope_store_kv(rows, rows, rows, *exact_where, table, 0)
        np.testing.assert_allclose(
            kernels.to_host(on_device.blocks).astype(np.float32),
            expected.blocks.astype(np.float32),
            rtol=0.02,
            atol=0.2,
        )
    else:
        q = np.zeros((8, 2, 64), dtype)
        out, lse = ops.attention_ragged(kernels.asarray(q), offsets, on_device, 0, return_lse=True)
        exact = reference.attention_ragged(widen(q), case.offsets(), cache.widened(), 0)
        np.testing.assert_allclose(
            kernels.to_host(out).astype(np.float64), exact, rtol=0.01, atol=0.01
        )
        np.testing.assert_allclose(
            kernels.to_host(lse)[:, 0], np.log(np.arange(1.0, 9.0)), atol=1e-5
        )
    assert kernels.take_errors() == ""


def test_the_first_element_of_the_cache_is_rotated(
    kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """On the second page of a sequence, since at position 0 nothing turns."""
    case = CacheCase(
        "",
        (0,),
        (8,),
        page_size=4,
        n_heads=2,
        n_kv_heads=1,
        num_layers=1,
        layer_idx=0,
        dtype=FLOAT32,
    )
    cache = at_the_start(case, rng)
    blocks = cache.blocks[[1, 0, *range(2, len(cache.blocks))]]
    cache = replace(cache, blocks=blocks, lookup_table=np.array([[1, 0]], np.uint32))
    offsets, on_device = case.place(kernels, cache)
    table = rotary_table(8, 64)
    q = case.rows(rng, 2)
    ops.rope_ragged(kernels.asarray(q), offsets, on_device, kernels.asarray(table), 0)
    reference.rope_ragged(q, case.offsets(), cache, table, 0)
    np.testing.assert_allclose(
        kernels.to_host(on_device.blocks), cache.blocks, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("store", [False, True])
def test_rows_past_the_last_offset_are_copied_whole(
    store: bool, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Where the rotated part is the last of a head too."""
    case = CacheCase("", (3, 0), (2, 3), page_size=4, n_heads=3, dtype=FLOAT32)
    cache = case.cache(rng)
    _, on_device = case.place(kernels, cache)
    q = case.rows(rng, 3)
    kv = kernels.asarray(case.rows(rng, 2))
    rotate = partial(ops.rope_store_kv, kernels.asarray(q), kv, kv)
    if not store:
        rotate = partial(ops.rope_ragged, kernels.asarray(q))
    out = rotate(
        kernels.asarray(np.array([0, 2, 3], np.int32)),
        on_device,
        kernels.asarray(rotary_table(9, 16)[1:]),  # no row is the identity
        1,
        rotate_last=True,
    )
    assert_bitwise_equal(kernels.to_host(out)[3:], q[3:])


@pytest.mark.parametrize("op", ["store", "add", "rope", "rope_store"])
def test_positions_of_more_than_32_bits_are_on_no_page(
    op: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Cut to 32 bits they would be negative, on the last page of the sequence before."""
    case = CacheCase("", (1, 1), (1, 2), page_size=1, dtype=FLOAT32)
    cache = case.cache(rng)
    cache.lookup_table[0, :] = cache.lookup_table[0, 0]
    cache.blocks[...] = 1
    cache.cache_lengths[1] = 2**32 - 1
    offsets, on_device = case.place(kernels, cache)
    rows = kernels.asarray(case.rows(rng, 2))
    twice = kernels.asarray(rotary_table(1, 64) * 2)
    if op == "rope":
        ops.rope_ragged(rows, offsets, on_device, twice, 1)
        assert "position" in kernels.take_errors()
    elif op == "rope_store":
        ops.rope_store_kv(rows, rows, rows, offsets, on_device, twice, 1)
        errors = kernels.take_errors()
        assert "position" in errors
        assert "page" in errors
    else:
        getattr(ops, f"{op}_kv")(rows, rows, offsets, on_device, 1)
        assert "page" in kernels.take_errors()
    blocks = kernels.to_host(on_device.blocks)
    live = cache.lookup_table[0, 0]
    assert (np.delete(blocks, live, axis=0) == 1).all()
    # The first sequence's own token is stored there, once.
    (case_alone, alone) = (replace(case, cached=(1,), new=(1,)), cache)
    alone = replace(
        cache, cache_lengths=cache.cache_lengths[:1], lookup_table=cache.lookup_table[:1]
    )
    offsets, expected = case_alone.place(kernels, alone)
    if op == "rope":
        ops.rope_ragged(rows[:1], offsets, expected, twice, 1)
        kernels.take_errors()
    elif op == "rope_store":
        one = rows[:1]
        ops.rope_store_kv(one, one, one, offsets, expected, twice, 1)
        kernels.take_errors()
    else:
        getattr(ops, f"{op}_kv")(rows[:1], rows[:1], offsets, expected, 1)
    assert_bitwise_equal(blocks, expected.blocks)


@pytest.mark.parametrize("length", [6, 20, 2**31 - 1, 2**31 + 5, 2**32 - 1])
@pytest.mark.parametrize("causal", [True, False])
def test_a_length_beyond_the_table_sees_what_the_table_holds(
    length: int, causal: bool, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = CacheCase("", (5,), (3,), page_size=4, n_heads=2, dtype=FLOAT32)
    cache = case.cache(rng)
    cache = replace(cache, lookup_table=np.ascontiguousarray(cache.lookup_table[:, :2]))
    offsets, on_device = case.place(kernels, cache)
    q = kernels.asarray(case.rows(rng, 2))
    expected = ops.attention_ragged(q, offsets, on_device, 1, causal=False, return_lse=True)
    assert kernels.take_errors() == ""
    too_long = replace(on_device, cache_lengths=kernels.asarray(np.array([length], np.uint32)))
    result = ops.attention_ragged(q, offsets, too_long, 1, causal=causal, return_lse=True)
    assert "page" in kernels.take_errors()
    rows = slice(1 if length == 6 and causal else 0, None)  # the row at position 6 sees 7 keys
    for one, other in zip(result, expected, strict=True):
        assert_bitwise_equal(one[rows], other[rows])


@each_dtype
def test_not_causal_over_several_blocks(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Rows of the first block of a sequence see keys that a later block's rows have brought."""
    case = CacheCase("", (3, 0), (70, 9), n_heads=2, n_kv_heads=1, head_dim=16, dtype=dtype)
    cache = case.cache(rng)
    offsets, on_device = case.place(kernels, cache)
    q = kernels.asarray(np.zeros((79, 2, 16), dtype))
    lse = ops.attention_ragged(q, offsets, on_device, 1, causal=False, return_lse=True)[1]
    keys = np.repeat([73.0, 9.0], [70, 9])
    np.testing.assert_allclose(
        kernels.to_host(lse), np.log(keys)[:, np.newaxis].repeat(2, 1), rtol=1e-6
    )


# ---- What has no rows --------------------------------------------------------------------------------


def test_a_sequence_without_tokens_needs_no_pages(
    kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = CacheCase("", (5, 9, 6), (2, 0, 3), page_size=4, dtype=FLOAT32)
    cache = case.cache(rng)
    offsets, on_device = case.place(kernels, cache)
    q = kernels.asarray(case.rows(rng, 4))
    expected = ops.attention_ragged(q, offsets, on_device, 1)
    cache.lookup_table[1] = 2**32 - 1
    cache.cache_lengths[1] = 2**31 + 5
    _, on_device = case.place(kernels, cache)
    assert_bitwise_equal(ops.attention_ragged(q, offsets, on_device, 1), expected)
    assert kernels.take_errors() == ""


def test_a_group_without_rows_may_have_any_slot(
    kernels: KernelDevice, rng: np.random.Generator
) -> None:
    x, a, b = (rng.standard_normal(shape) for shape in ((18, 8), (1, 8, 8), (1, 8, 8)))
    x, a, b = (kernels.asarray(array.astype(np.float32)) for array in (x, a, b))
    offsets = kernels.asarray(np.array([0, 0, 16, 16, 18, 18], np.int32))
    ids = kernels.asarray(np.array([9, 0, 7, 0, 100], np.int32))
    y = ops.sgmv_lora(x, a, b, ids, None, offsets)
    ids = kernels.asarray(np.array([-1, 0, -1, 0, -1], np.int32))
    assert_bitwise_equal(y, ops.sgmv_lora(x, a, b, ids, None, offsets))
    assert kernels.take_errors() == ""


# ---- Offsets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [1, 128, 256, 300])
@pytest.mark.parametrize("op", ["shrink", "attention", "rope", "rope_store"])
def test_a_bad_offset_anywhere(
    op: str, place: int, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """More segments than a block has threads; one offset is lower than the one before it."""
    offsets = np.arange(301, dtype=np.int32)
    offsets[place] = offsets[place - 1] - 1
    offsets_on_device = kernels.asarray(offsets)
    if op == "shrink":
        x, a = (kernels.asarray(np.ones(shape, np.float32)) for shape in ((300, 4), (1, 1, 4)))
        ops.sgmv_shrink(x, a, kernels.asarray(np.zeros(300, np.int32)), None, offsets_on_device)
    else:
        case = CacheCase(
            "", (0,) * 300, (1,) * 300, n_heads=1, n_kv_heads=1, head_dim=8, dtype=FLOAT32
        )
        cache = kernels.cache(replace(case, page_size=1).cache(rng))
        q = kernels.asarray(case.rows(rng, 1))
        if op == "rope":
            table = kernels.asarray(rotary_table(4, 8))
            ops.rope_ragged(q, offsets_on_device, cache, table, 1)
        elif op == "rope_store":
            table = kernels.asarray(rotary_table(4, 8))
            ops.rope_store_kv(q, q, q, offsets_on_device, cache, table, 1)
        else:
            ops.attention_ragged(q, offsets_on_device, cache, 1)
    assert "offsets" in kernels.take_errors()


@pytest.mark.parametrize("offsets", [(0, 2**31 - 1, 9), (0, -(2**31), 9), (0, 2**30, 2**31 - 1)])
def test_bad_offsets_of_many_heads(
    offsets: tuple[int, ...], kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Offsets times heads need more than 32 bits: sanitizers see to it that nothing overflows."""
    case = CacheCase("", (3, 2), (4, 5), n_heads=16, n_kv_heads=1, head_dim=8, dtype=FLOAT32)
    cache = kernels.cache(case.cache(rng))
    q = kernels.asarray(case.rows(rng, 16))
    ops.attention_ragged(q, kernels.asarray(np.array(offsets, np.int32)), cache, 1)
    assert "offsets" in kernels.take_errors()


@pytest.mark.parametrize("op", ["store", "add"])
def test_tokens_beyond_32_bits_are_past_the_last_offset(
    op: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Offsets of a tail of a batch start anywhere; rows past the last of them are ignored."""
    case = CacheCase("", (3,), (2,), dtype=FLOAT32)
    cache = case.cache(rng)
    _, on_device = case.place(kernels, cache)
    rows = kernels.asarray(case.rows(rng, 2))
    offsets = kernels.asarray(np.full(2, 2**31 - 1, np.int32))
    getattr(ops, f"{op}_kv")(rows, rows, offsets, on_device, 1)
    assert_bitwise_equal(on_device.blocks, cache.blocks)
    assert ("offsets" in kernels.take_errors()) == (op == "store")
