"""Bad values that only the device sees: never out of bounds, and `check_errors` tells of each.

The arrays here are on the device, so that validation cannot look into them. The emulator reports
writes around arrays itself; under its sanitizers, and compute-sanitizer on a GPU, reads too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit import ops, reference
from lorakit.testing import (
    adapters,
    assert_bitwise_equal,
    assert_within_budget,
    rotary_table,
    row_offsets,
    widen,
)
from tests.ops.helpers import FLOAT32, CacheCase

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

CASE = CacheCase("", (9, 0, 5), (2, 4, 3), page_size=4, n_heads=2, dtype=FLOAT32)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


class Step:
    """One small batch on the device, its metadata open to damage."""

    def __init__(
        self, kernels: KernelDevice, rng: np.random.Generator, case: CacheCase = CASE
    ) -> None:
        self.kernels, self.case = kernels, case
        self.cache = case.cache(rng)
        self.before = replace(self.cache.copy(), lookup_table=self.cache.lookup_table.copy())
        self.q = case.rows(rng, case.n_heads)
        self.k, self.v = case.rows(rng, case.n_kv_heads), case.rows(rng, case.n_kv_heads)
        self.table = rotary_table(16, case.head_dim)
        self.offsets = case.offsets().view(np.int32)
        self.adapter = adapters(2, 8, 128, 128, case.dtype, rng, ranks=[8, 5])
        self.ids = np.array([0, -1, 1], np.int32)

    def run(self, op: str) -> tuple[list[NDArray[Any]], NDArray[Any]]:
        """The results of an op, and the cache after it."""
        place = self.kernels.asarray
        on_device = self.kernels.cache(self.cache)
        q, k, v, offsets = map(place, (self.q, self.k, self.v, self.offsets))
        x = place(self.q.reshape(len(self.q), -1))
        a, b, ids = map(place, (self.adapter.lora_a, self.adapter.lora_b, self.ids))
        calls: dict[str, Callable[[], Any]] = {
            "rope": lambda: ops.rope_ragged(q, offsets, on_device, place(self.table), 1),
            "rope_store": lambda: ops.rope_store_kv(
                q, k, v, offsets, on_device, place(self.table), 1
            ),
            "store": lambda: ops.store_kv(k, v, offsets, on_device, 1),
            "add": lambda: ops.add_kv(k, v, offsets, on_device, 1),
            "attention": lambda: ops.attention_ragged(q, offsets, on_device, 1, return_lse=True),
            "shrink": lambda: ops.sgmv_shrink(x, a, ids, None, offsets),
            "expand": lambda: ops.sgmv_expand(
                place(np.ones((len(self.q), 8), np.float32)), b, ids, None, offsets
            ),
            "qkv": lambda: ops.sgmv_qkv_lora(
                x, [a] * 3, [b] * 3, ids, None, offsets, offsets, on_device, 1
            ),
        }
        result = calls[op]()
        results = result if isinstance(result, tuple) else (result,)
        hosts = [self.kernels.to_host(array) for array in results if array is not None]
        return hosts, self.kernels.to_host(on_device.blocks)


# ---- Offsets -----------------------------------------------------------------------------------------

BAD_OFFSETS = {
    "decreasing": (0, 6, 2, 9),
    "past the last row": (0, 2, 6, 1000),
    "far past the last row": (0, INT_MAX, INT_MAX, INT_MAX),
    "negative": (0, -5, 6, 9),
    "most negative": (0, INT_MIN, INT_MIN, 9),
    "first negative": (-3, 2, 6, 9),
    "first negative, and no more rows than there are": (-1, 2, 6, 8),
    "up and down": (0, INT_MAX, INT_MIN, 9),
}
ALL_OPS = ("rope", "rope_store", "store", "add", "attention", "shrink", "expand", "qkv")


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("offsets", BAD_OFFSETS.values(), ids=BAD_OFFSETS.keys())
def test_bad_offsets(
    offsets: tuple[int, ...], op: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    step = Step(kernels, rng)
    step.offsets = np.array(offsets, np.int32)
    _, blocks = step.run(op)
    assert "offsets" in kernels.take_errors()
    if op in ("attention", "shrink", "expand"):
        assert_bitwise_equal(blocks, step.before.blocks)


@pytest.mark.parametrize("op", [op for op in ALL_OPS if op != "add"])
def test_offsets_that_start_above_0(
    op: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """For add_kv these are the offsets of a tail of the batch, and right."""
    step = Step(kernels, rng)
    step.offsets = np.array((1, 2, 6, 9), np.int32)
    step.run(op)
    assert "offsets" in kernels.take_errors()


@pytest.mark.parametrize("op", [op for op in ALL_OPS if op != "add"])
def test_rows_before_the_first_offset(
    op: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Also when they are more than a block takes: in no sequence, without an adapter.

    Attention leaves them unwritten.
    """
    case = CacheCase("", (9, 0, 5), (40, 4, 3), page_size=4, n_heads=2, dtype=FLOAT32)
    step = Step(kernels, rng, case)
    step.table = rotary_table(64, case.head_dim)
    step.offsets = np.array((40, 43, 44, 47), np.int32)
    results, blocks = step.run(op)
    assert "offsets" in kernels.take_errors()
    if op in ("rope", "rope_store"):
        assert_bitwise_equal(results[0][:40], step.q[:40])
    elif op in ("shrink", "expand", "qkv"):
        assert not results[0][:40].any()
    changed = (blocks != step.before.blocks) & ~np.isnan(step.before.blocks)
    assert (
        changed.any(axis=(1, 2, 4, 5)).sum() <= 7
    )  # slots of the seven rows that are in a sequence


@pytest.mark.parametrize("op", ALL_OPS)
def test_rows_past_the_last_offset(
    op: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """As when a replayed graph has fewer tokens: no error; no sequence, no adapter, no key."""
    step = Step(kernels, rng)
    step.offsets = np.array((0, 2, 4, 4), np.int32)
    results, blocks = step.run(op)
    assert kernels.take_errors() == ""
    if op in ("rope", "rope_store"):
        assert_bitwise_equal(results[0][4:], step.q[4:])
    elif op == "attention":
        assert not results[0][4:].any()
        assert (results[1][4:] == -np.inf).all()
    elif op in ("shrink", "expand", "qkv"):
        assert not results[0][4:].any()
    # The first four rows are as they are in a batch of these only.
    short = Step(kernels, np.random.default_rng(0))
    for name in ("cache", "q", "k", "v", "adapter"):
        setattr(short, name, getattr(step, name))
    short.q, short.k, short.v, short.offsets = step.q[:4], step.k[:4], step.v[:4], step.offsets
    expected, expected_blocks = short.run(op)
    for result, other in zip(results, expected, strict=True):
        assert_bitwise_equal(result[:4], other)
    assert_bitwise_equal(blocks, expected_blocks)


def test_no_sequence_but_rows(kernels: KernelDevice, rng: np.random.Generator) -> None:
    step = Step(kernels, rng)
    step.offsets = np.zeros(1, np.int32)
    step.cache = replace(
        step.cache, cache_lengths=np.zeros(0, np.uint32), lookup_table=np.zeros((0, 3), np.uint32)
    )
    for op in ("rope", "rope_store"):
        (rotated,), blocks = step.run(op)
        assert_bitwise_equal(rotated, step.q)
        assert_bitwise_equal(blocks, step.before.blocks)
    (out, lse), _ = step.run("attention")
    assert not out.any()
    assert (lse == -np.inf).all()
    for op in ("store", "add"):
        assert_bitwise_equal(step.run(op)[1], blocks)
    assert_bitwise_equal(blocks, step.before.blocks)


# ---- Slots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", [2, 100, INT_MAX])
@pytest.mark.parametrize("op", ["shrink", "expand", "qkv"])
def test_a_bad_slot_is_a_base_row(
    op: str, slot: int, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    step = Step(kernels, rng)
    step.ids = np.array([0, -1, -1], np.int32)
    expected, expected_blocks = step.run(op)
    step.ids = np.array([0, slot, INT_MIN], np.int32)
    result, blocks = step.run(op)
    assert "slot" in kernels.take_errors()
    assert np.abs(result[0][:2]).max() > 0.1
    assert not result[0][2:].any()
    assert_bitwise_equal(result[0], expected[0])
    assert_bitwise_equal(blocks, expected_blocks)


@pytest.mark.parametrize("ranks", [(2**31 - 1, 100), (-1, -(2**31))])
def test_ranks_beyond_the_stored_one(
    ranks: tuple[int, int], kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Whatever a rank says, no more than the stored ranks are read."""
    made = adapters(2, 8, 64, 40, FLOAT32, rng, ranks=[8, 8])
    x = rng.standard_normal((4, 64)).astype(np.float32)
    arguments: list[Any] = [kernels.asarray(array) for array in (x, made.lora_a, made.lora_b)]
    arguments += [np.array([0, 1], np.int32), None, np.array([0, 2, 4], np.int32)]
    lora: Any = ops.sgmv_lora
    y = lora(*arguments, slot_ranks=kernels.asarray(np.array(ranks, np.int32)))
    assert np.isfinite(kernels.to_host(y)).all()
    if ranks[0] > 0:
        assert_bitwise_equal(y, lora(*arguments))


# ---- Pages and positions -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["num_pages", "largest", "missing"])
@pytest.mark.parametrize("op", ["store", "add", "rope", "rope_store", "qkv"])
def test_a_bad_page_is_skipped(
    op: str, page: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """The rows of one page are not written; everything else is as it should be."""
    step = Step(kernels, rng)
    _, good = step.run(op)
    if page == "missing":  # sequence 0 is at position 9 .. 11 on page 2 of a table of 2 pages
        step.cache = replace(
            step.cache, lookup_table=np.ascontiguousarray(step.cache.lookup_table[:, :2])
        )
    else:
        bad = {"num_pages": len(step.cache.blocks), "largest": 2**32 - 1}[page]
        step.cache.lookup_table[0, 2] = bad
    results, blocks = step.run(op)
    assert "page" in kernels.take_errors()
    skipped = int(step.before.lookup_table[0, 2])
    assert (blocks[skipped] != good[skipped]).any()
    expected = good.copy()
    expected[skipped] = step.before.blocks[skipped]
    assert_bitwise_equal(blocks, expected)
    if op in ("rope", "rope_store"):
        step.cache = step.before
        assert_bitwise_equal(results[0], step.run(op)[0][0], "queries")


@pytest.mark.parametrize("length", [12, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("op", ["store", "add", "rope", "rope_store", "qkv", "attention"])
def test_positions_past_the_table_of_pages(
    op: str, length: int, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """A sequence longer than its row of lookup_table does not run into the next sequence's row."""
    step = Step(kernels, rng)
    width = step.cache.lookup_table.shape[1]
    assert width * CASE.page_size <= 16
    step.cache.lookup_table[...] = step.cache.lookup_table[2, 0]  # no entry is bad by itself
    step.cache.cache_lengths[0] = max(length, width * CASE.page_size)
    step.cache.blocks[...] = 1
    _, blocks = step.run(op)
    errors = kernels.take_errors()
    assert "page" in errors
    assert op not in ("rope", "rope_store") or "position" in errors
    others = np.arange(len(blocks)) != step.cache.lookup_table[2, 0]
    assert_bitwise_equal(blocks[others], step.cache.blocks[others])


def test_keys_of_a_bad_page_are_masked(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """Attention goes on without them, as if the sequence had never held them."""
    step = Step(kernels, rng)
    step.cache.lookup_table[0, 1] = len(step.cache.blocks)  # keys 4 .. 7 of 11
    (out, lse), _ = step.run("attention")
    assert "page" in kernels.take_errors()
    page = step.before.lookup_table[0]
    slots = step.before.blocks[page[:3], :, 1]  # [page, part, slot, head, dim]
    keys, values = (slots[:, part].reshape(12, 2, 64).astype(np.float64) for part in (0, 1))
    for row in range(2):
        seen = [j for j in range(10 + row) if not 4 <= j < 8]
        for head in range(2):
            scores = keys[seen, head] @ widen(step.q[row, head]) / 8
            weights = np.exp(scores - scores.max())
            exact = weights @ values[seen, head] / weights.sum()
            np.testing.assert_allclose(out[row, head], exact, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(
                lse[row, head], scores.max() + np.log(weights.sum()), rtol=1e-6
            )


def test_a_sequence_without_a_valid_page_sees_no_key(
    kernels: KernelDevice, rng: np.random.Generator
) -> None:
    step = Step(kernels, rng)
    step.cache.lookup_table[1] = 2**32 - 1
    (out, lse), _ = step.run("attention")
    assert "page" in kernels.take_errors()
    assert not out[2:6].any()
    assert (lse[2:6] == -np.inf).all()
    step.cache = step.before
    (good, _), _ = step.run("attention")
    others = [0, 1, 6, 7, 8]
    assert_bitwise_equal(out[others], good[others])


def test_a_position_past_freqs_cis_is_clamped(
    kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """To the last row of the table: both for queries and for keys."""
    step = Step(kernels, rng)
    step.table = step.table[:6]  # sequence 0 is at 9, 10; sequence 2 at 5, 6, 7
    (out,), blocks = step.run("rope")
    assert "position" in kernels.take_errors()
    clamped = np.concatenate([step.table, np.repeat(step.table[-1:], 10, axis=0)])
    exact = step.before.widened()
    exact_q = reference.rope_ragged(widen(step.q), row_offsets(CASE.new), exact, clamped, 1)
    size = np.full(exact_q.shape, 2 * np.abs(step.q).max(), np.float64)
    assert_within_budget(out, exact_q, np.float32, size, length=2)
    live = ~np.isnan(exact.blocks)
    size = np.full(live.sum(), 2 * np.abs(exact.blocks[live]).max())
    assert_within_budget(blocks[live], exact.blocks[live], np.float32, size, length=2)


@pytest.mark.parametrize("damage", ["page", "position", "both", "offsets"])
def test_stored_and_rotated_at_once_or_apart(
    damage: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """rope_store_kv reports and writes what store_kv and then rope_ragged do."""
    step = Step(kernels, rng)
    if damage in ("page", "both"):
        step.cache.lookup_table[0, 2] = len(step.cache.blocks)
    if damage in ("position", "both"):
        step.table = step.table[:6]
    if damage == "offsets":
        step.offsets = np.array((0, 6, 2, 9), np.int32)
    together, blocks = step.run("rope_store")
    errors = kernels.take_errors()
    assert all(word in errors for word in {"both": ("page", "position")}.get(damage, (damage,)))
    _, stored = step.run("store")
    step.cache = replace(step.cache, blocks=stored)
    apart, other_blocks = step.run("rope")
    assert kernels.take_errors() == errors
    if damage != "offsets":  # which row is whose is then not said
        assert_bitwise_equal(together[0], apart[0], "queries")
        assert_bitwise_equal(blocks, other_blocks, "the cache")


# ---- The error word ----------------------------------------------------------------------------------


def test_an_error_stays_until_it_is_read(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """Good calls in between do not clear it, several kinds add up, reading clears them."""
    step = Step(kernels, rng)
    good = step.offsets
    step.offsets = np.array((0, 6, 2, 9), np.int32)
    step.run("shrink")
    step.offsets, step.ids = good, np.array([7, 0, 1], np.int32)
    step.run("shrink")
    step.ids = np.array([0, 0, 1], np.int32)
    step.run("shrink")
    errors = kernels.take_errors()
    assert "offsets" in errors
    assert "slot" in errors
    assert "page" not in errors
    assert kernels.take_errors() == ""
