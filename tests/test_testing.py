"""The shared builders and the error budget: they keep their word, and wrong results are caught."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.dtypes import STORAGE, bfloat16, float16, float32, ulp
from lorakit.reference import attention_ragged
from lorakit.testing import (
    MODELS,
    activations,
    adapters,
    assert_bitwise_equal,
    assert_within_budget,
    attention_error,
    count_bytes,
    lora_batch,
    paged_cache,
    rope_terms,
    rotary_table,
    row_offsets,
    sum_factor,
    widen,
)

each_dtype = pytest.mark.parametrize("dtype", STORAGE, ids=str)
PATTERNS = ["identical", "distinct", "uniform", "zipf", "skewed", "halfbase", "seg8"]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ulp


@pytest.mark.parametrize("dtype", [float16, float32], ids=str)
def test_ulp_is_the_spacing_of_numpy(dtype: Any) -> None:
    info = np.finfo(dtype)
    values = np.array(
        [0, 1, 1.5, 0.999, 3, 1e-3, info.smallest_subnormal, info.tiny, info.max / 2, -7], dtype
    )
    np.testing.assert_array_equal(ulp(values, dtype), np.abs(widen(np.spacing(values))))


def test_ulp_of_bfloat16_is_the_distance_to_the_next_bit_pattern() -> None:
    patterns = np.array([0, 1, 0x7F, 0x80, 0x3F7F, 0x3F80, 0x4049, 0x7F00], np.uint16)
    values, following = patterns.view(bfloat16), (patterns + 1).astype(np.uint16).view(bfloat16)
    np.testing.assert_array_equal(ulp(values, bfloat16), widen(following) - widen(values))


def test_ulp_of_what_is_not_finite_is_nan() -> None:
    assert np.isnan(ulp([np.inf, np.nan], float32)).all()


# Batches


@pytest.mark.parametrize("total_tokens", [0, 1, 7, 64, 333])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_covers_the_rows_without_empty_groups(
    pattern: str, total_tokens: int
) -> None:
    slot_ranks = np.array([8, 1, 16, 3, 5])
    batch = lora_batch(pattern, total_tokens, 5, generator(), slot_ranks=slot_ranks)
    assert [a.dtype for a in batch.metadata] == [np.int32, np.uint32, np.uint32]
    assert batch.lora_grouped_offsets[0] == 0
    assert batch.total_tokens == total_tokens
    assert (np.diff(batch.lora_grouped_offsets.astype(int)) > 0).all()
    assert len(batch.lora_ranks) == len(batch.lora_ids) == len(batch.lora_grouped_offsets) - 1
    assert not batch.lora_ranks[batch.lora_ids < 0].any()
    for slot, rank in zip(*batch.per_row(), strict=True):
        assert rank == (slot_ranks[slot] if slot >= 0 else 0)
    again = lora_batch(pattern, total_tokens, 5, generator(), slot_ranks=slot_ranks)
    for one, other in zip(batch.metadata, again.metadata, strict=True):
        np.testing.assert_array_equal(one, other)


def test_patterns_spread_the_rows_as_they_say() -> None:
    def sizes(pattern: str, total: int = 256, count: int = 4) -> list[int]:
        batch = lora_batch(pattern, total, count, generator())
        return [int(n) for n in np.diff(batch.lora_grouped_offsets)]

    assert sizes("identical") == [256]
    assert sizes("distinct", 5) == [1] * 5
    assert sizes("uniform") == [64] * 4
    assert sizes("uniform", 10) == [2, 3, 3, 2]
    assert sizes("zipf", 1200, 3) == [655, 327, 218]  # 1, 1/2, 1/3
    assert sizes("skewed", 190, 3) == [90, 60, 40]  # 1.5, 1.5, 1.5
    assert sizes("seg8", 20) == [8, 8, 4]


def test_distinct_gives_every_row_its_own_adapter_and_halfbase_half_of_the_rows_none() -> None:
    distinct = lora_batch("distinct", 12, 16, generator()).lora_ids
    assert len(set(distinct.tolist())) == 12
    assert (np.diff(lora_batch("distinct", 40, 3, generator()).lora_ids) != 0).all()
    rows, _ = lora_batch("halfbase", 240, 6, generator()).per_row()
    assert np.count_nonzero(rows < 0) == 120
    assert set(rows.tolist()) == {-1, 0, 1, 2, 3, 4, 5}
    odd, _ = lora_batch("halfbase", 3, 3, generator()).per_row()
    assert (odd >= 0).all()  # groups of one row have no second half


def test_flops_count_true_ranks_only() -> None:
    batch = lora_batch("halfbase", 8, 1, generator(), slot_ranks=[3])
    assert batch.flops(in_dim=10, out_dim=20) == 4 * 2 * 3 * 30


@pytest.mark.parametrize("pattern", ["popular", "seg", "seg0", "seg-1", "segment"])
def test_an_unknown_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=f"pattern: wanted .*got '{pattern}'"):
        lora_batch(pattern, 8, 2, generator())


def test_row_offsets_are_the_running_sums() -> None:
    offsets = row_offsets([3, 0, 2])
    assert offsets.dtype == np.uint32
    assert offsets.tolist() == [0, 3, 3, 5]
    assert row_offsets([]).tolist() == [0]


# Inputs


@each_dtype
def test_adapters_mix_ranks_and_poison_what_lies_beyond(dtype: Any) -> None:
    stack = adapters(6, 8, 12, 20, dtype, generator(), poison=True)
    assert stack.slot_ranks[:3].tolist() == [8, 4, 1]
    assert stack.lora_a.shape == (6, 8, 12)
    assert stack.lora_b.shape == (6, 20, 8)
    assert stack.lora_b.transpose(0, 2, 1).flags.c_contiguous
    for slot, rank in enumerate(stack.slot_ranks):
        assert np.isfinite(widen(stack.lora_a[slot, :rank])).all()
        assert np.isnan(widen(stack.lora_a[slot, rank:])).all()
        assert np.isfinite(widen(stack.lora_b[slot, :, :rank])).all()
        assert np.isnan(widen(stack.lora_b[slot, :, rank:])).all()
    clean = adapters(6, 8, 12, 20, dtype, generator())
    assert not widen(clean.lora_a[2, 1:]).any()
    assert not widen(clean.lora_b[2, :, 1:]).any()


def test_adapters_give_deltas_of_size_one() -> None:
    stack = adapters(4, 16, 512, 256, float32, generator(), ranks=[16, 8, 1, 4])
    x = generator(1).standard_normal((200, 512))
    for slot in range(4):
        assert 0.5 < (x @ stack.delta_weight(slot).T).std() < 2.0


def test_activations_have_outliers() -> None:
    values = np.abs(activations((64, 64), float32, generator()))
    assert 20 < values.max() < 120
    assert np.median(values) == pytest.approx(0.68, abs=0.05)


def test_a_paged_cache_is_nan_wherever_no_token_lives() -> None:
    before, new, page_size = [5, 0, 8], [4, 0, 1], 4
    cache = paged_cache(
        before, new, page_size=page_size, n_kv_heads=2, head_dim=8, dtype=bfloat16,
        rng=generator(), num_layers=2, layer_idx=1, store_new=False, other_layers=3.0,
    )  # fmt: skip
    num_pages, used = len(cache.blocks), [3, 0, 3]
    assert num_pages == 3 * sum(used) + 1
    assert cache.cache_lengths.tolist() == before
    assert cache.max_lengths.tolist() == [[4, 9]]
    pages = [int(p) for b in range(3) for p in cache.lookup_table[b, : used[b]]]
    assert len(set(pages)) == len(pages)
    assert pages != sorted(pages)
    live = np.zeros(cache.blocks.shape, bool)
    for b in range(3):
        assert (cache.lookup_table[b, used[b] :] == num_pages).all()
        for position in range(before[b]):
            page = cache.lookup_table[b, position // page_size]
            live[page, :, 1, position % page_size] = True
    values = widen(cache.blocks)
    assert (values[:, :, 0] == 3.0).all()
    np.testing.assert_array_equal(np.isfinite(values[:, :, 1]), live[:, :, 1])


def test_the_rotary_table_holds_cos_and_sin_in_turn() -> None:
    table = rotary_table(8, 4, theta=100.0)
    assert table.dtype == np.float32
    expected = [math.cos(7), math.sin(7), math.cos(0.7), math.sin(0.7)]
    np.testing.assert_allclose(table[7], expected, rtol=1e-6)


def test_models_have_their_published_widths() -> None:
    assert {name: (m.q_dim, m.kv_dim) for name, m in MODELS.items()} == {
        "llama-3-8b": (4096, 1024),
        "llama-3-70b": (8192, 1024),
        "llama-3.2-1b": (2048, 512),
        "llama-2-7b": (4096, 4096),
        "gemma-2-9b": (4096, 2048),
        "qwen2-7b": (3584, 512),
        "mistral-7b": (4096, 1024),
        "tiny": (96, 32),
    }


# The error budget


@each_dtype
def test_correct_rounding_uses_at_most_a_quarter_of_the_budget(dtype: Any) -> None:
    exact = generator().standard_normal(1000) * np.exp(generator(1).uniform(-9, 9, 1000))
    used = assert_within_budget(exact.astype(dtype), exact, dtype)
    assert 0.2 < used <= 0.25 + 1e-4  # half a unit of two


@each_dtype
@pytest.mark.parametrize(("units", "stores", "right"), [
    (2, 1, True), (3, 1, False), (3, 2, True), (4, 2, False),
])  # fmt: skip
def test_the_budget_of_storing_is_one_unit_for_each_store_and_one_more(
    dtype: Any, units: int, stores: int, right: bool
) -> None:
    exact = np.array([1.5, -3.0, 96.0])
    actual = (exact + units * ulp(exact, dtype) * np.sign(exact)).astype(dtype)
    if right:
        assert assert_within_budget(actual, exact, dtype, stores=stores) == 1.0
    else:
        with pytest.raises(AssertionError, match="beyond their budget"):
            assert_within_budget(actual, exact, dtype, stores=stores)


def test_the_message_names_the_worst_element() -> None:
    exact = np.ones((3, 4))
    actual = exact.astype(np.float32)
    actual[0, 1], actual[2, 3] = 1.001, 1.5
    with pytest.raises(AssertionError) as caught:
        assert_within_budget(actual, exact, np.float32, name="delta")
    assert str(caught.value) == (
        "delta: 2 of 12 elements are beyond their budget; the worst is [2, 3]: got 1.5, exact 1.0, "
        "error 0.5, budget 2.384e-07 (storing 2.384e-07 = 2 ulp of float32, summing 0, "
        "propagated 0)"
    )


def test_each_part_of_the_budget_is_needed() -> None:
    exact, actual = np.array([1.0]), np.array([1.0 + 2.0**-12], np.float32)
    parts: list[dict[str, Any]] = [
        {"terms64": [256.0], "length": 8},  # 16 * 2**-24 * 2**8
        {"propagated64": [2.0**-12]},
        {"largest64": [2.0**11]},
    ]
    for part in parts:
        assert_within_budget(actual, exact, np.float32, **part)
    too_little: list[dict[str, Any]] = [
        {},
        {"terms64": [128.0], "length": 8},
        {"terms64": [256.0], "length": 4},
        {"propagated64": [2.0**-13]},
        {"largest64": [2.0**9]},
    ]
    for part in too_little:
        with pytest.raises(AssertionError, match="beyond their budget"):
            assert_within_budget(actual, exact, np.float32, **part)
    with pytest.raises(ValueError, match="length: wanted"):
        assert_within_budget(actual, exact, np.float32, terms64=[256.0])


@pytest.mark.parametrize(
    ("got", "exact", "right"),
    [
        (np.nan, np.nan, True),
        (np.inf, np.inf, True),
        (np.nan, 1.0, False),
        (1.0, np.nan, False),
        (np.inf, -np.inf, False),
        (1.0, np.inf, False),
        (np.inf, 100.0, False),
        (np.inf, 65521.0, True),  # rounds to infinity in float16
        (65504.0, 65521.0, True),
        (-np.inf, 65521.0, False),
    ],
)
def test_what_is_not_finite_must_agree(got: float, exact: float, right: bool) -> None:
    actual, expected = np.array([0.0, got], np.float16), np.array([0.0, exact])
    if right:
        assert_within_budget(actual, expected, np.float16)
    else:
        with pytest.raises(AssertionError, match=r"the worst is \[1\]"):
            assert_within_budget(actual, expected, np.float16)


def test_the_dtype_and_the_shape_must_be_the_ones_wanted() -> None:
    with pytest.raises(AssertionError, match="wanted dtype float32, got float64"):
        assert_within_budget(np.ones(2), np.ones(2), np.float32)
    with pytest.raises(AssertionError, match=r"wanted shape \(2,\), got \(2, 1\)"):
        assert_within_budget(np.ones((2, 1), np.float32), np.ones(2), np.float32)
    assert assert_within_budget(np.ones((0, 3), np.float32), np.ones((0, 3)), np.float32) == 0.0


def truncate(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """To 24 bits, toward zero."""
    fraction, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.trunc(np.ldexp(fraction, 24)), exponent - 24))


@pytest.mark.parametrize("same_sign", [False, True], ids=["signs-mixed", "one-sign"])
@pytest.mark.parametrize("length", [1, 2, 16, 64, 256, 1024, 4096])
def test_float32_sums_in_any_order_are_within_the_budget(length: int, same_sign: bool) -> None:
    products = generator().standard_normal((200, length)) ** (2 if same_sign else 1)
    products = products.astype(np.float32).astype(np.float64)
    one_by_one = np.zeros(200, np.float32)
    for k in range(length):
        one_by_one += products[:, k].astype(np.float32)
    tensor_core = np.zeros(200)
    for k in range(0, length, 8):  # eight products at a time, truncated
        tensor_core = truncate(tensor_core + products[:, k : k + 8].sum(axis=1))
    for result in (one_by_one, tensor_core.astype(np.float32)):
        assert_within_budget(
            result, products.sum(axis=1), np.float32, np.abs(products).sum(axis=1), length=length
        )


@pytest.mark.parametrize("length", [16, 64, 256])
def test_tf32_products_and_bfloat16_partial_sums_are_beyond_the_budget(length: int) -> None:
    x, w = generator().standard_normal((2, 200, length)).astype(np.float32)
    exact, terms = (widen(x) * widen(w)).sum(axis=1), np.abs(widen(x) * widen(w)).sum(axis=1)
    tf32 = [(a.view(np.uint32) & 0xFFFFE000).view(np.float32) for a in (x, w)]
    halves = (x * w).reshape(200, 2, -1).sum(axis=2).astype(bfloat16).astype(np.float32)
    for wrong in ((tf32[0] * tf32[1]).sum(axis=1), halves.sum(axis=1)):
        with pytest.raises(AssertionError, match="beyond their budget"):
            assert_within_budget(wrong, exact, np.float32, terms, length=length)


def test_factors_of_nested_sums_add() -> None:
    assert sum_factor([64, 4]) == sum_factor(64) + sum_factor(4) == 64.0 + 8.0
    assert sum_factor(()) == 0.0


def float32_attention(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], probability_dtype: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One head of attention, all in float32; ``probability_dtype`` rounds the numerator."""
    scores = (q @ k.T * np.float32(q.shape[1] ** -0.5)).astype(np.float32)
    highest = scores.max(axis=1, keepdims=True)
    p = np.exp(scores - highest)
    out = p.astype(probability_dtype).astype(np.float32) @ v / p.sum(axis=1, keepdims=True)
    return out, (highest + np.log(p.sum(axis=1, keepdims=True)))[:, 0]


def test_the_error_of_attention_covers_float32_and_rounded_probabilities_separately() -> None:
    rng, keys = generator(), 300
    cache = paged_cache(
        [keys - 20], [20], page_size=16, n_kv_heads=1, head_dim=64, dtype=float32, rng=rng
    )
    q, offsets = activations((20, 1, 64), float32, rng), row_offsets([20])
    out64, lse64 = attention_ragged(
        widen(q), offsets, cache.widened(), 0, causal=False, return_lse=True
    )
    positions = np.arange(keys)
    pages = cache.lookup_table[0, positions // 16]
    k, v = (cache.blocks[pages, part, 0, positions % 16, 0] for part in (0, 1))

    def check(computed: Any, allowed: Any) -> None:
        results = float32_attention(q[:, 0], k, v, computed)
        errors = attention_error(q, offsets, cache, 0, causal=False, probability_dtype=allowed)
        assert_within_budget(results[1][:, None], lse64, float32, propagated64=errors[1])
        assert_within_budget(results[0][:, None], out64, float32, propagated64=errors[0])

    check(float32, None)
    for half in (float16, bfloat16):
        check(half, half)
        with pytest.raises(AssertionError, match="beyond their budget"):
            check(half, None)
    with pytest.raises(AssertionError, match="beyond their budget"):
        check(bfloat16, float16)


def test_the_error_of_attention_covers_a_soft_cap_and_sinks() -> None:
    """float32 stays within it; what tanh.approx or a sink in bfloat16 would lose does not."""
    rng, keys, cap = generator(), 300, np.float32(5)
    cache = paged_cache(
        [keys - 20], [20], page_size=16, n_kv_heads=1, head_dim=64, dtype=float32, rng=rng
    )
    q, offsets = activations((20, 1, 64), float32, rng), row_offsets([20])
    sink = np.float32(4.578)
    options: dict[str, Any] = {"causal": False, "soft_cap": float(cap), "sinks": np.array([sink])}
    out64, lse64 = attention_ragged(
        widen(q), offsets, cache.widened(), 0, return_lse=True, **options
    )
    out_error, lse_error = attention_error(q, offsets, cache, 0, **options)
    positions = np.arange(keys)
    pages = cache.lookup_table[0, positions // 16]
    k, v = (cache.blocks[pages, part, 0, positions % 16, 0] for part in (0, 1))

    def check(tanh_error: float, sink: Any) -> None:
        scores = np.tanh(q[:, 0] @ k.T * np.float32(0.125) / cap) * np.float32(1 + tanh_error) * cap
        p = np.exp(scores.astype(np.float32))
        total = p.sum(axis=1, keepdims=True) + np.exp(np.float32(sink))
        assert_within_budget(np.log(total), lse64, float32, propagated64=lse_error, name="LSE")
        assert_within_budget((p @ v / total)[:, None], out64, float32, propagated64=out_error)

    check(0.0, sink)
    for tanh_error, wrong in ((2.0**-11, sink), (0.0, sink.astype(bfloat16)), (0.0, -np.inf)):
        with pytest.raises(AssertionError, match="beyond their budget"):
            check(tanh_error, wrong)


def test_the_terms_of_a_rotation_are_its_absolute_products() -> None:
    cache = paged_cache(
        [1], [1], page_size=2, n_kv_heads=1, head_dim=3, dtype=float32, rng=generator()
    )
    page, table = cache.lookup_table[0, 0], np.array([[1, 0], [-0.6, 0.8]], np.float32)
    cache.blocks[page, 0, 0, 1, 0] = [1, -10, -5]
    q = np.array([[[-100, -1000, -7]]], np.float32)
    q_terms, k_terms = rope_terms(q, row_offsets([1]), cache, table, 0)
    np.testing.assert_allclose(q_terms[0, 0], [60 + 800, 80 + 600, 7], rtol=1e-6)
    np.testing.assert_allclose(k_terms[page, 0, 0, 1, 0], [0.6 + 8, 0.8 + 6, 5], rtol=1e-6)


# Bits and bytes


@each_dtype
def test_bitwise_equality_tells_zeros_and_nans_apart(dtype: Any) -> None:
    one = np.array([[0.0, np.nan], [1.0, 2.0]], dtype)
    assert_bitwise_equal(one, one.copy())
    assert_bitwise_equal(one.T, one.T.copy())
    minus = one.copy()
    minus[0, 0] = -0.0
    with pytest.raises(AssertionError, match=r"1 of 4 elements differ; the first is \[0, 0\]"):
        assert_bitwise_equal(one, minus)
    payload = one.copy()
    payload.view(f"u{payload.dtype.itemsize}")[0, 1] ^= 1
    assert np.isnan(widen(payload)[0, 1])
    with pytest.raises(AssertionError, match=r"the first is \[0, 1\]: nan \(0x7f?"):
        assert_bitwise_equal(one, payload)


def test_bitwise_equality_gives_both_values_and_their_bits() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_bitwise_equal(np.array([1, 2], bfloat16), np.array([1, 3], bfloat16), "k")
    assert str(caught.value) == (
        "k: 1 of 2 elements differ; the first is [1]: 2.0 (0x4000) against 3.0 (0x4040)"
    )


def test_bitwise_equality_wants_the_same_dtype_and_shape() -> None:
    with pytest.raises(AssertionError, match=r"float32 \[2\] against float16 \[2\]"):
        assert_bitwise_equal(np.ones(2, np.float32), np.ones(2, np.float16))
    with pytest.raises(AssertionError, match=r"\[2\] against float32 \[2, 1\]"):
        assert_bitwise_equal(np.ones(2, np.float32), np.ones((2, 1), np.float32))


def test_bytes_are_counted_from_the_arrays() -> None:
    x = np.zeros((4, 6), bfloat16)
    assert count_bytes(x, None, np.zeros(3, np.uint32)) == 48 + 12
    assert count_bytes(x[:, ::2]) == 24
    assert count_bytes() == 0
