"""attention_ragged: output and LSE within the budget of float32 arithmetic, and its extremes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorakit import ops, reference, tiles
from lorakit.dtypes import bfloat16
from lorakit.testing import (
    PagedCache,
    assert_bitwise_equal,
    assert_within_budget,
    attention_error,
    widen,
)
from lorakit.tiles import Instance
from tests.ops.helpers import (
    FLOAT16,
    FLOAT32,
    CacheCase,
    each_dtype,
    launches,
    parameters,
    side_by_side,
    skip_where_slow,
    split_error,
)

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

BF16, FP16, FP32 = (bfloat16,), (FLOAT16,), (FLOAT32,)


@dataclass(frozen=True)
class Case(CacheCase):
    causal: bool = True
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    soft_cap: float | None = None
    sinks: tuple[float, ...] | None = None
    """Of the query heads in turn."""
    narrow_sinks: bool = False
    """Whether they have the dtype of the queries."""

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the op, all on the host."""
        dtype = self.dtype if self.narrow_sinks else np.float32
        return {
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "sinks": None
            if self.sinks is None
            else np.resize(self.sinks, self.n_heads).astype(dtype),
        }

    def instances(self) -> set[Instance]:
        if not self.total_tokens:
            return set()
        group = self.n_heads // self.n_kv_heads
        rows = max(self.new) * group
        decode = {
            tiles.attention_decode(self.dtype, self.head_dim, min(rows, max(32, group))),
            tiles.attention_merge(self.dtype, self.head_dim),
        }
        few = max(self.new) == 1 or rows <= 32
        if few and tiles.attention_decodes(self.dtype, self.head_dim):
            return decode
        return decode | {tiles.attention_ragged(self.dtype, self.head_dim)}


CASES = (
    Case("prefill", (0, 0, 0), (5, 1, 38)),
    Case("decode", (7, 31, 15, 16), (1, 1, 1, 1)),
    Case("mixed", (70, 60, 3), (1, 39, 4)),
    # Head dims, each padded size in each dtype.
    Case("head_dim_8", (3, 0), (2, 20), head_dim=8),
    Case("head_dim_24", (20, 0), (2, 20), head_dim=24),
    Case("head_dim_40", (20, 0), (2, 20), head_dim=40, dtypes=FP16),
    Case("head_dim_72", (20, 0), (2, 20), head_dim=72, dtypes=BF16),
    Case("head_dim_80", (20, 0), (2, 20), head_dim=80, dtypes=FP16),
    Case("head_dim_96", (20, 0), (2, 20), head_dim=96),
    Case("head_dim_112", (20, 0), (2, 20), head_dim=112, dtypes=BF16),
    Case("head_dim_128", (20, 0), (2, 20), head_dim=128),
    Case("head_dim_192", (33, 0), (2, 20), head_dim=192),
    Case("head_dim_256", (33, 0), (2, 20), head_dim=256),
    # Heads on one key head.
    Case("one_head", (9, 0), (3, 40), n_heads=1, n_kv_heads=1, dtypes=FP16),
    Case("every_head_its_own", (9, 0), (3, 40), n_heads=8, n_kv_heads=8, dtypes=BF16),
    Case("seven_on_one", (9, 0), (11, 2), n_heads=7, n_kv_heads=1),
    Case("eight_on_one", (9, 0), (11, 2), n_heads=8, n_kv_heads=1, dtypes=BF16),
    Case("six_on_two", (9, 0), (11, 2), n_heads=6, n_kv_heads=2, dtypes=FP16),
    Case("seventy_one_on_one", (9,), (2,), n_heads=71, n_kv_heads=1, head_dim=16, dtypes=BF16),
    # Lengths around tiles of keys (64, 32, 16) and of rows (64 or 32 with four heads on two).
    Case("keys_63_64_65", (62, 63, 64), (1, 1, 1), dtypes=BF16),
    Case("keys_31_32_33", (30, 31, 32), (1, 1, 1), dtypes=FP32),
    Case(
        "rows_31_32_33", (0, 5, 40), (31, 32, 33), n_heads=2, n_kv_heads=1, head_dim=16, dtypes=FP16
    ),
    Case(
        "rows_15_16_17", (1, 0, 2), (15, 16, 17), n_heads=2, n_kv_heads=1, head_dim=16, dtypes=FP32
    ),
    Case("long_decode", (257, 1), (1, 1), head_dim=16),
    # Chunks of 1, 2 and 4 tiles of 64 keys, as many as there can be, and one more.
    Case("chunks_of_1_and_2", (511, 512, 1300), (1, 1, 1)),
    Case("chunks_of_2_and_4", (2047, 2048), (1, 1), dtypes=FP16),
    Case("chunks_head_dim_256", (900, 300), (1, 2), head_dim=256),
    Case("sixteen_rows_and_more", (200, 700), (9, 16), n_heads=2, n_kv_heads=1, dtypes=BF16),
    Case("few_rows_beside_many", (300, 20, 0, 600), (1, 40, 2, 3), dtypes=FP16),
    Case("many_key_heads", (90, 260), (1, 1), n_heads=34, n_kv_heads=34, head_dim=16, dtypes=BF16),
    Case("five_key_heads", (90, 700), (1, 2), n_heads=10, n_kv_heads=5, head_dim=40, dtypes=FP16),
    Case("chunks_of_8_and_more", (16384, 65535, 65536, 131072), (1, 1, 1, 2), gpu_only=True),
    Case("empty_sequences", (0, 4, 0, 9, 2), (0, 3, 0, 22, 0)),
    Case("no_tokens", (4, 0), (0, 0), dtypes=BF16),
    Case("no_sequences", (), (), dtypes=BF16),
    Case("many_sequences", (0, 1, 2, 3, 4) * 8, (1, 0, 2, 1, 3) * 8, head_dim=16, dtypes=BF16),
    # Pages.
    Case("page_size_16", (127, 40, 300), (3, 1, 2), page_size=16, head_dim=128, dtypes=FP16),
    Case("page_size_48", (127, 40, 300), (3, 1, 2), page_size=48, head_dim=128, dtypes=BF16),
    Case("page_size_1", (6, 0), (3, 24), page_size=1, dtypes=FP16),
    Case("page_size_3", (20, 3, 0), (3, 1, 27), page_size=3, dtypes=BF16),
    Case("page_size_128", (127, 0, 128), (3, 9, 1), page_size=128, head_dim=16, dtypes=BF16),
    Case("prefix_sharing", (16, 18, 20), (4, 1, 22), page_size=8, shared_pages=2, dtypes=BF16),
    Case("first_of_three_layers", (2, 5), (3, 23), num_layers=3, layer_idx=0, dtypes=FP16),
    # Arguments.
    Case("not_causal", (7, 0, 40), (5, 19, 1), causal=False),
    Case("scale_0", (7, 0), (5, 19), scale=0.0, dtypes=BF16),
    Case("scale_negative", (7, 0), (5, 19), scale=-0.3, dtypes=FP16),
    Case("scale_1", (7, 0), (5, 19), scale=1.0, dtypes=FP32),
    Case("fused_projection", (2, 5), (3, 17), strided=True),
    Case("int32_metadata", (2, 5), (3, 23), metadata=np.int32, dtypes=BF16),
    Case("host_metadata", (2, 5), (3, 23), host_metadata=True, dtypes=BF16),
    Case(
        "llama",
        (3000, 0, 1, 4095),
        (1, 300, 64, 1),
        page_size=128,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        gpu_only=True,
    ),
)


def run(
    case: Case, kernels: KernelDevice, q: Any, cache: PagedCache, **options: Any
) -> tuple[Any, Any]:
    offsets, on_device = case.place(kernels, cache)
    result: tuple[Any, Any] = ops.attention_ragged(
        kernels.asarray(q) if isinstance(q, np.ndarray) and kernels.name == "gpu" else q,
        offsets,
        on_device,
        case.layer_idx,
        return_lse=True,
        **options,
    )
    return result


def check(
    case: Case, kernels: KernelDevice, q: Any, cache: PagedCache, result: tuple[Any, Any]
) -> None:
    """Output and LSE against the exact ones."""
    arguments: Any = (case.offsets(), cache.widened(), case.layer_idx)
    options = case.options()
    out64, lse64 = reference.attention_ragged(widen(q), *arguments, **options, return_lse=True)
    out_error, lse_error = attention_error(q, *arguments, **options)
    # Two 16-bit terms carry a probability: what they lose weighs the average of |v|.
    magnitudes = replace(cache, blocks=widen(cache.blocks))
    magnitudes.blocks[:, 1] = np.abs(magnitudes.blocks[:, 1])
    average = reference.attention_ragged(
        widen(q), case.offsets(), magnitudes, case.layer_idx, **options
    )
    out_error += split_error(case.dtype) * average
    assert_within_budget(result[0], out64, case.dtype, propagated64=out_error, name="output")
    assert_within_budget(result[1], lse64, np.float32, propagated64=lse_error, name="LSE")


@parameters(CASES, Case.instances)
def test_attention(
    case: Case,
    kernels: KernelDevice,
    rng: np.random.Generator,
) -> None:
    skip_where_slow(case, kernels)
    cache = case.cache(rng)
    q = case.rows(rng, case.n_heads)
    q_on_device = kernels.asarray(q)
    if case.strided:
        k = case.rows(rng, case.n_kv_heads)
        q_on_device = side_by_side(kernels, q, k, k)[0]
        assert q_on_device.strides[0] > q.strides[0]
    offsets, on_device = case.place(kernels, cache)
    with launches(kernels) as seen:
        result = ops.attention_ragged(
            q_on_device,
            offsets,
            on_device,
            case.layer_idx,
            scale=case.scale,
            causal=case.causal,
            return_lse=True,
        )
    assert seen == case.instances()
    check(case, kernels, q, cache, result)
    assert_bitwise_equal(on_device.blocks, cache.blocks, "the cache")
    alone = ops.attention_ragged(
        q_on_device, offsets, on_device, case.layer_idx, scale=case.scale, causal=case.causal
    )
    assert_bitwise_equal(alone, result[0], "the output without LSE")


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_row_has_the_same_bits_however_blocks_share_the_keys(
    head_dim: int,
    dtype: Any,
    kernels: KernelDevice,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """Alone in the batch and among others, by instances of 8 and of 16 rows, on any number of blocks."""
    cached, new = (1100, 0, 90, 600), (1, 3, 16, 2)
    case = Case("", cached, new, dtype=dtype, head_dim=head_dim, page_size=32)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    starts = case.offsets().astype(int)
    results = []
    for blocks in (1, 3, 8, 26, 700):
        monkeypatch.setattr(kernels.backend, "resident_blocks", lambda _, blocks=blocks: blocks)
        results.append(
            [kernels.to_host(part) for part in run(case, kernels, kernels.asarray(q), cache)]
        )
    check(case, kernels, q, cache, (results[0][0], results[0][1]))
    for b in range(len(new)):
        one = replace(case, cached=cached[b : b + 1], new=new[b : b + 1])
        part = replace(
            cache,
            cache_lengths=cache.cache_lengths[b : b + 1],
            lookup_table=cache.lookup_table[b : b + 1],
            max_lengths=np.array([[new[b], cached[b] + new[b]]], np.uint32),
        )
        alone = run(one, kernels, kernels.asarray(q[starts[b] : starts[b + 1]]), part)
        for result in results:
            for whole, own in zip(result, alone, strict=True):
                assert_bitwise_equal(whole[starts[b] : starts[b + 1]], own, f"sequence {b}")


def test_more_tokens_than_max_lengths_says(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """Known on the host it is refused; on the device it is reported."""
    case = Case("", (5, 0), (1, 3), dtype=bfloat16)
    cache = case.cache(rng)
    cache.max_lengths[0, 0] = 2
    q = kernels.asarray(case.rows(rng, case.n_heads))
    with pytest.raises(ValueError) as caught:
        run(replace(case, host_metadata=True), kernels, q, cache)
    assert str(caught.value) == (
        "kv_collection.max_lengths says that no sequence has more than 2 new tokens, but "
        "input_row_offsets has one with 3"
    )
    run(case, kernels, q, cache)
    assert "offsets" in kernels.take_errors()


@pytest.mark.parametrize("wrong", [np.zeros((0, 2), np.uint32), np.zeros(2, np.uint32)])
def test_max_lengths_of_another_shape(
    wrong: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = Case("", (5, 0), (1, 3), dtype=bfloat16)
    cache = replace(case.cache(rng), max_lengths=wrong)
    with pytest.raises(ValueError, match=r"kv_collection.max_lengths must have shape \[steps, 2\]"):
        run(case, kernels, kernels.asarray(case.rows(rng, case.n_heads)), cache)


@each_dtype
def test_equal_scores_average_the_live_rows(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Queries of zero: out is the mean of exactly the values seen, LSE the logarithm of their number."""
    case = Case("", (31, 0, 70), (1, 4, 2), dtype=dtype)
    cache = case.cache(rng)
    cache.blocks[...] = np.where(
        np.isnan(cache.blocks.astype(np.float32)), np.nan, rng.integers(-8, 9, cache.blocks.shape)
    )
    q = np.zeros((7, 4, 64), dtype)
    out, lse = (kernels.to_host(part) for part in run(case, kernels, kernels.asarray(q), cache))
    check(case, kernels, q, cache, (out, lse))
    values = cache.blocks[cache.lookup_table[0, :2], 1, 1].reshape(32, 2, 64)
    # 32 small integers: their sum and their mean are exact in every dtype but for the last rounding.
    mean = values.astype(np.float32).mean(axis=0).repeat(2, axis=0).astype(dtype)
    assert_bitwise_equal(out[0], mean)
    np.testing.assert_allclose(lse[0], np.log(32.0), rtol=2e-7)
    np.testing.assert_allclose(lse[1:5, 0], np.log([1.0, 2.0, 3.0, 4.0]), rtol=2e-7, atol=2e-7)


@each_dtype
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_a_quarter_million(
    sign: int, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """The largest score takes all the weight: its value comes back bit for bit, nothing overflows."""
    case = Case("", (40, 3), (2, 9), n_heads=2, n_kv_heads=2, dtype=dtype, scale=1.0)
    cache = case.cache(rng)
    values = ~np.isnan(cache.blocks[:, 1].astype(np.float32))
    keys = cache.blocks[:, 0]
    keys[values] = 0
    q = np.zeros((11, 2, 64), dtype)
    q[..., 0] = 500
    q[..., 1] = 2
    winners, scores = [], []
    for b, length in enumerate((42, 12)):  # the score of position p is sign * 250000 +- 40 p
        for p in range(length):
            page, slot = cache.lookup_table[b, p // 16], p % 16
            keys[page, 1, slot, :, 0] = sign * 500
            keys[page, 1, slot, :, 1] = 20 * p * (-1) ** p
    for row in range(11):
        b, last = (0, 40 + row) if row < 2 else (1, 3 + row - 2)
        winner = last if last % 2 == 0 else last - 1
        winners.append(cache.blocks[cache.lookup_table[b, winner // 16], 1, 1, winner % 16])
        scores.append(sign * 250000.0 + 40.0 * winner)
    offsets, on_device = case.place(kernels, cache)
    out, lse = ops.attention_ragged(
        kernels.asarray(q), offsets, on_device, 1, scale=1.0, return_lse=True
    )
    assert_bitwise_equal(out, np.stack(winners))
    np.testing.assert_allclose(
        kernels.to_host(lse), np.repeat(np.array(scores)[:, np.newaxis], 2, 1), rtol=3e-7
    )


@each_dtype
def test_a_row_whose_scores_are_minus_infinity_is_zero(dtype: Any, kernels: KernelDevice) -> None:
    case = Case("", (20, 0), (2, 3), dtype=dtype)
    cache = case.cache(np.random.default_rng(1))
    q = np.ones((5, 4, 64), dtype)
    q[0, :, 1:] = 0  # -inf * 1 + 0 * ...
    page = cache.lookup_table[0, :2]
    cache.blocks[page, 0, 1, :, :, 0] = -np.inf
    q[1:2] = 0
    q[1:2, :, 0] = 1
    out, lse = (kernels.to_host(part) for part in run(case, kernels, kernels.asarray(q), cache))
    assert_bitwise_equal(out[:2], np.zeros_like(out[:2]))
    assert (lse[:2] == -np.inf).all()
    assert np.isfinite(lse[2:]).all()
    assert np.abs(out[2:]).max() > 0.1


@each_dtype
def test_nan_in_a_live_slot_is_seen(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """A NaN key or value is in every row that sees it, of its own sequence and head only."""
    case = Case("", (20, 5), (1, 3), dtype=dtype)
    cache = case.cache(rng)
    q = kernels.asarray(case.rows(rng, case.n_heads))
    clean = kernels.to_host(run(case, kernels, q, cache)[0])
    for part in (0, 1):
        dirty = cache.copy()
        dirty.blocks[cache.lookup_table[0, 0], part, 1, 7, 1, 3] = np.nan
        out = kernels.to_host(run(case, kernels, q, dirty)[0])
        assert np.isnan(out[0, 2:, 3]).all()
        assert_bitwise_equal(out[0, :2], clean[0, :2], "the other head")
        assert_bitwise_equal(out[1:], clean[1:], "the other sequence")


@pytest.mark.parametrize(
    "part",
    [
        0,
        pytest.param(
            1,
            marks=pytest.mark.xfail(
                strict=True, reason="a masked value is multiplied with 0, and 0 * NaN is NaN"
            ),
        ),
    ],
    ids=["key", "value"],
)
def test_nan_behind_the_causal_mask_is_not_seen(
    part: int, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Queries before a token that is NaN do not see it, though it is live and of their sequence."""
    case = Case("", (3,), (6,), dtype=FLOAT16)
    cache = case.cache(rng)
    q = kernels.asarray(case.rows(rng, case.n_heads))
    clean = kernels.to_host(run(case, kernels, q, cache)[0])
    cache.blocks[cache.lookup_table[0, 0], part, 1, 7] = np.nan  # of query 4
    out = kernels.to_host(run(case, kernels, q, cache)[0])
    assert np.isnan(out[4:]).all()
    assert_bitwise_equal(out[:4], clean[:4])


@each_dtype
@pytest.mark.parametrize("past", [0, 1, 60])
def test_nan_behind_the_last_key_of_a_block_is_not_seen(
    past: int, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """A value that no row of a block sees is not even multiplied with 0."""
    case = Case("", (3,), (130,), dtype=dtype)
    tile = tiles.attention_ragged(dtype, case.head_dim)
    tokens = tiles.attention_block_m(tile) // (case.n_heads // case.n_kv_heads)  # of a block
    assert tokens + past < 130
    cache = case.cache(rng)
    q = kernels.asarray(case.rows(rng, case.n_heads))
    clean = kernels.to_host(run(case, kernels, q, cache)[0])
    page, slot = divmod(3 + tokens + past, case.page_size)
    cache.blocks[cache.lookup_table[0, page], 1, 1, slot] = np.nan
    out = kernels.to_host(run(case, kernels, q, cache)[0])
    assert_bitwise_equal(out[:tokens], clean[:tokens])
    assert np.isnan(out[tokens + past :]).all()


@each_dtype
def test_scattered_pages_and_pages_in_a_row(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Where pages lie in the cache changes no bit, ascending, descending or at random."""
    case = Case("", (100, 0, 30), (1, 9, 3), page_size=8, dtype=dtype)
    scattered = case.cache(rng)
    q = kernels.asarray(case.rows(rng, case.n_heads))
    expected = run(case, kernels, q, scattered)
    pages = np.arange(scattered.blocks.shape[0])
    for order in (pages, pages[::-1]):
        cache = scattered.copy()
        cache.blocks[...] = np.nan
        free = iter(order)
        table = cache.lookup_table.copy()
        for b, length in enumerate((101, 9, 33)):
            for logical in range(-(-length // 8)):
                table[b, logical] = next(free)
                cache.blocks[table[b, logical]] = scattered.blocks[
                    scattered.lookup_table[b, logical]
                ]
        result = run(case, kernels, q, replace(cache, lookup_table=table))
        for one, other in zip(result, expected, strict=True):
            assert_bitwise_equal(one, other)


def test_a_page_repeated_within_a_sequence(kernels: KernelDevice, rng: np.random.Generator) -> None:
    case = Case("", (24,), (3,), page_size=8, dtype=bfloat16)
    cache = case.cache(rng)
    cache.lookup_table[0, 1:3] = cache.lookup_table[0, 0]
    q = case.rows(rng, case.n_heads)
    check(case, kernels, q, cache, run(case, kernels, kernels.asarray(q), cache))


def test_causal_is_aligned_bottom_right(kernels: KernelDevice) -> None:
    """With two cached keys and three new ones, query i averages keys 0 .. i + 2."""
    case = Case("", (2,), (3,), n_heads=1, n_kv_heads=1, dtype=FLOAT32)
    cache = case.cache(np.random.default_rng(0))
    cache.blocks[cache.lookup_table[0, 0], 1, 1, :5, 0] = np.eye(5, 64)
    q = kernels.asarray(np.zeros((3, 1, 64), np.float32))
    out = kernels.to_host(run(case, kernels, q, cache)[0])[:, 0, :5]
    expected = np.tri(3, 5, 2) / np.array([[3.0], [4.0], [5.0]])
    np.testing.assert_allclose(out, expected, rtol=3e-7)
