"""Attention against a dense softmax with an explicit mask, head by head."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.dtypes import STORAGE, float32
from lorakit.reference import attention_ragged, store_kv
from lorakit.testing import (
    PagedCache,
    activations,
    assert_bitwise_equal,
    assert_within_budget,
    paged_cache,
    row_offsets,
    widen,
)
from tests.reference.dense import cached, softmax_attention

each_dtype = pytest.mark.parametrize("dtype", STORAGE, ids=str)

# name: (cached before, new, page size, query heads, kv heads, head_dim)
CASES: dict[str, tuple[list[int], list[int], int, int, int, int]] = {
    "prefill-without-cache": ([0, 0], [7, 3], 4, 4, 4, 16),
    "decode": ([3, 16, 7, 0], [1, 1, 1, 1], 8, 4, 2, 16),
    "chunk-on-a-cache": ([5, 11], [6, 2], 4, 4, 2, 16),
    "gqa-4": ([3], [5], 4, 8, 2, 8),
    "gqa-7": ([9, 2], [2, 3], 16, 7, 1, 8),
    "mha-head-dim-72": ([2], [3], 2, 3, 3, 72),
    "head-dim-128": ([17], [2], 16, 2, 1, 128),
    "page-size-1": ([2, 0], [3, 1], 1, 2, 1, 8),
    "last-page-with-one-token": ([8], [1], 4, 2, 2, 8),
    "last-page-full": ([5], [3], 4, 2, 2, 8),
    "a-sequence-without-new-tokens": ([4, 6, 0], [2, 0, 3], 4, 2, 1, 8),
    "an-empty-sequence": ([0, 2], [0, 2], 4, 2, 1, 8),
    "no-tokens": ([4], [0], 4, 2, 1, 8),
    "no-sequences": ([], [], 4, 2, 1, 8),
}
each_case = pytest.mark.parametrize("name", CASES)


class Case:
    """Queries and a cache with this step's tokens stored, in layer 1 of 2."""

    def __init__(self, name: str, dtype: Any) -> None:
        self.before, self.new, page_size, self.heads, kv_heads, self.head_dim = CASES[name]
        rng = np.random.default_rng(0)
        self.offsets = row_offsets(self.new)
        self.cache = paged_cache(
            self.before,
            self.new,
            page_size=page_size,
            n_kv_heads=kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            rng=rng,
            num_layers=2,
            layer_idx=1,
        )
        self.q = activations((sum(self.new), self.heads, self.head_dim), dtype, rng)

    def dense(
        self,
        scale: float,
        causal: bool = True,
        window: Any = None,
        soft_cap: float | None = None,
        sinks: NDArray[Any] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Output and LSE from an explicit mask, of ``j <= i + keys - queries`` and the window."""
        left, right = window or (None, None)
        out, lse = np.zeros(self.q.shape), np.zeros(self.q.shape[:2])
        group = self.heads // self.cache.blocks.shape[4]
        for b, (before, new) in enumerate(zip(self.before, self.new, strict=True)):
            rows = slice(int(self.offsets[b]), int(self.offsets[b + 1]))
            keys, values = (cached(self.cache, p, 1, b, range(before + new)) for p in (0, 1))
            after = np.arange(before + new) - np.arange(before, before + new)[:, np.newaxis]
            visible = (after <= 0) | (not causal)
            visible &= after >= (-math.inf if left is None else -left)
            visible &= after <= (math.inf if right is None else right)
            for head in range(self.heads):
                kv = head // group
                out[rows, head], lse[rows, head] = softmax_attention(
                    self.q[rows, head], keys[:, kv], values[:, kv], visible, scale, soft_cap,
                    None if sinks is None else float(sinks[head]),
                )  # fmt: skip
        return out, lse


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@each_case
@each_dtype
def test_attention_is_a_dense_softmax(dtype: Any, name: str, causal: bool) -> None:
    case = Case(name, dtype)
    old = case.cache.copy()
    out, lse = attention_ragged(case.q, case.offsets, case.cache, 1, causal=causal, return_lse=True)
    exact, exact_lse = case.dense(1 / math.sqrt(case.head_dim), causal)
    assert_within_budget(out, exact, dtype, name="output")
    assert_within_budget(lse, exact_lse, float32, name="LSE")
    assert_bitwise_equal(case.cache.blocks, old.blocks, "the cache")
    alone = attention_ragged(case.q, case.offsets, case.cache, 1, causal=causal)
    assert_bitwise_equal(alone, out)


@pytest.mark.parametrize("scale", [0.0, 0.25, -1.0])
def test_scale_multiplies_the_scores_and_zero_is_a_scale(scale: float) -> None:
    case = Case("chunk-on-a-cache", np.float32)
    out, lse = attention_ragged(case.q, case.offsets, case.cache, 1, scale=scale, return_lse=True)
    exact, exact_lse = case.dense(scale)
    assert_within_budget(out, exact, np.float32)
    assert_within_budget(lse, exact_lse, np.float32)
    if scale == 0.0:  # all keys alike: the mean of the values, and the number of keys
        values = widen(cached(case.cache, 1, 1, 0, range(6)))
        np.testing.assert_allclose(out[0, 0], values[:, 0].mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(lse[0], math.log(6), rtol=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "left": {"window": (3, None)},
    "own-key": {"window": (0, 0), "causal": False},
    "right": {"window": (None, 1), "causal": False},
    "both": {"window": (2, 3), "causal": False},
    "right-causal": {"window": (None, 2)},
    "wide": {"window": (100, 2**40), "causal": False},
    "cap": {"soft_cap": 2.0},
    "small-cap": {"soft_cap": 1e-3, "causal": False},
    "large-cap": {"soft_cap": 1e6},
    "sinks": {"sinks": (0.0, 3.0, -2.0, 12.0)},
    "far-sinks": {"sinks": (500.0, -500.0, -np.inf, 40.0)},
    "all": {"window": (4, 1), "soft_cap": 3.0, "sinks": (1.0, -1.0), "causal": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["prefill-without-cache", "decode", "chunk-on-a-cache", "gqa-7"])
@each_dtype
def test_options_against_the_dense_softmax(dtype: Any, name: str, options: dict[str, Any]) -> None:
    case = Case(name, dtype)
    if "sinks" in options:
        options = options | {"sinks": np.resize(options["sinks"], case.heads).astype(dtype)}
    out, lse = attention_ragged(case.q, case.offsets, case.cache, 1, return_lse=True, **options)
    exact, exact_lse = case.dense(1 / math.sqrt(case.head_dim), **options)
    assert_within_budget(out, exact, dtype, name="output")
    assert_within_budget(lse, exact_lse, float32, name="LSE")


def test_a_window_a_cap_and_a_sink_by_hand() -> None:
    """Keys 1 and 2 of 0, 1, 2 are seen; capped scores are ln 2 and 0, the sink's is ln 5."""
    soft_cap = 2 * math.log(2)  # its half is ln 2, and tanh(ln(3) / 2) is a half
    cache, offsets = one_head([7, soft_cap * math.log(3) / 2, 0], [100, 16, 24], before=2)
    out, lse = attention_ragged(
        np.ones((1, 1, 1), np.float32), offsets, cache, 0, scale=1.0, return_lse=True,
        window=(1, None), soft_cap=soft_cap, sinks=np.array([math.log(5)], np.float32),
    )  # fmt: skip
    np.testing.assert_allclose(out.ravel(), [(2 * 16 + 24) / (2 + 1 + 5)], rtol=1e-6)
    np.testing.assert_allclose(lse.ravel(), [math.log(8)], rtol=1e-6)


@pytest.mark.parametrize("sink", [-math.inf, 0.0, 1e5, math.inf])
def test_a_row_that_sees_no_key_has_no_sink(sink: float) -> None:
    cache, offsets = one_head([-math.inf, -math.inf, 1.0], [1, 2, 3], before=1)
    out, lse = attention_ragged(
        np.ones((2, 1, 1), np.float32), offsets, cache, 0, scale=1.0, return_lse=True,
        sinks=np.array([sink], np.float32),
    )  # fmt: skip
    assert out[0] == 0.0
    assert lse[0] == -math.inf
    # The other row sees a key of score 1, which all but the first two sinks outweigh by far.
    share = 1 / (1 + math.exp(min(sink, 700.0) - 1))
    np.testing.assert_allclose(out[1, 0, 0], 3 * share, rtol=1e-6, atol=1e-30)
    expected = sink if sink > 700 else 1 - math.log(share)
    np.testing.assert_allclose(lse[1, 0], expected, rtol=1e-6)


def test_nan_outside_the_window_is_not_seen() -> None:
    case = Case("chunk-on-a-cache", np.float32)
    options: dict[str, Any] = {"window": (2, 1), "causal": False}
    clean = attention_ragged(case.q, case.offsets, case.cache, 1, **options)
    position = 8  # of sequence 0, whose new tokens are 5 .. 10: those from 7 on see it
    case.cache.blocks[case.cache.lookup_table[0, position // 4], :, 1, position % 4] = np.nan
    out = attention_ragged(case.q, case.offsets, case.cache, 1, **options)
    assert np.isnan(out[2:6]).all()
    assert_bitwise_equal(np.delete(out, range(2, 6), 0), np.delete(clean, range(2, 6), 0))


def one_head(
    keys: list[float], values: list[float], before: int
) -> tuple[PagedCache, NDArray[np.uint32]]:
    """One sequence with one head of one element and pages of two tokens."""
    cache = paged_cache(
        [before], [len(keys) - before], page_size=2, n_kv_heads=1, head_dim=1, dtype=np.float32,
        rng=np.random.default_rng(0), store_new=False,
    )  # fmt: skip
    step = PagedCache(cache.blocks, np.zeros(1, np.uint32), cache.lookup_table, cache.max_lengths)
    k, v = (np.array(x, np.float32).reshape(-1, 1, 1) for x in (keys, values))
    store_kv(k, v, row_offsets([len(keys)]), step, 0)
    return cache, row_offsets([len(keys) - before])


def test_worked_by_hand() -> None:
    # Scores 0, ln 2, ln 5 weigh 1, 2 and 5. The first query sees two keys, the second three.
    cache, offsets = one_head([0, math.log(2), math.log(5)], [8, 16, 24], before=1)
    out, lse = attention_ragged(
        np.ones((2, 1, 1), np.float32), offsets, cache, 0, scale=1.0, return_lse=True
    )
    expected = [(8 + 2 * 16) / 3, (8 + 2 * 16 + 5 * 24) / 8]
    np.testing.assert_allclose(out.ravel(), expected, rtol=1e-6)
    np.testing.assert_allclose(lse.ravel(), [math.log(3), math.log(8)], rtol=1e-6)


def test_rows_past_the_last_offset_see_no_key() -> None:
    case = Case("decode", np.float32)
    q = np.concatenate([case.q, case.q])
    out, lse = attention_ragged(q, case.offsets, case.cache, 1, return_lse=True)
    assert_bitwise_equal(out[4:], np.zeros_like(case.q))
    assert_bitwise_equal(lse[4:], np.full((4, 4), -np.inf, np.float32))
    assert np.isfinite(lse[:4]).all()


def test_a_row_whose_scores_are_all_minus_infinity_is_zero() -> None:
    cache, offsets = one_head([-math.inf, -math.inf, 1.0], [1, 2, 3], before=1)
    out, lse = attention_ragged(
        np.ones((2, 1, 1), np.float32), offsets, cache, 0, scale=1.0, return_lse=True
    )
    assert out.ravel().tolist() == [0.0, 3.0]
    assert lse.ravel().tolist() == [-math.inf, 1.0]


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_nan_in_a_live_slot_reaches_the_rows_that_see_it_and_no_other(part: int) -> None:
    case = Case("chunk-on-a-cache", np.float32)
    clean = attention_ragged(case.q, case.offsets, case.cache, 1)
    position = 8  # of sequence 0, whose new tokens are 5 .. 10: rows 3, 4 and 5 see it
    page, slot = case.cache.lookup_table[0, position // 4], position % 4
    case.cache.blocks[page, part, 1, slot, 0] = np.nan  # kv head 0: query heads 0 and 1
    out = attention_ragged(case.q, case.offsets, case.cache, 1)
    touched = np.zeros(out.shape, bool)
    touched[3:6, :2] = True
    assert np.isnan(out[touched]).all()
    assert_bitwise_equal(out[~touched], clean[~touched])


def test_what_lies_outside_the_sequences_never_matters() -> None:
    case = Case("chunk-on-a-cache", np.float32)
    clean = attention_ragged(case.q, case.offsets, case.cache, 1)
    other = case.cache.copy()
    assert np.isnan(other.blocks).mean() > 0.5
    other.blocks[np.isnan(other.blocks)] = 1e30
    assert_bitwise_equal(attention_ragged(case.q, case.offsets, other, 1), clean)


@each_dtype
def test_prefill_then_decode_agrees_with_one_long_prefill(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    whole = paged_cache([0], [11], page_size=4, n_kv_heads=2, head_dim=8, dtype=dtype, rng=rng)
    q = activations((11, 4, 8), dtype, rng)
    expected = attention_ragged(q, row_offsets([11]), whole, 0)
    for start, stop in [(0, 8), (8, 9), (9, 10), (10, 11)]:
        step = PagedCache(
            whole.blocks, np.array([start], np.uint32), whole.lookup_table, whole.max_lengths
        )
        out = attention_ragged(q[start:stop], row_offsets([stop - start]), step, 0)
        assert_within_budget(out, widen(expected[start:stop]), dtype)


def test_float64_inputs_are_not_rounded() -> None:
    case = Case("gqa-4", np.float32)
    out, lse = attention_ragged(
        widen(case.q), case.offsets, case.cache.widened(), 1, return_lse=True
    )
    exact, exact_lse = case.dense(1 / math.sqrt(case.head_dim))
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, exact, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-12)


def test_strided_queries_give_the_same_bits() -> None:
    case = Case("gqa-4", np.float32)
    wide = np.full((5, 12, 8), np.nan, np.float32)
    wide[:, 2:10] = case.q
    assert_bitwise_equal(
        attention_ragged(wide[:, 2:10], case.offsets, case.cache, 1),
        attention_ragged(case.q, case.offsets, case.cache, 1),
    )
