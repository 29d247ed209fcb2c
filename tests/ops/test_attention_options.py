"""The window, the soft cap and the sinks of attention_ragged, alone and together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit import ops, tiles
from lorakit.dtypes import bfloat16
from lorakit.testing import PagedCache, assert_bitwise_equal, row_offsets
from tests.ops.helpers import FLOAT16, FLOAT32, each_dtype
from tests.ops.test_attention import BF16, FP16, FP32, Case, check

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

SMALL: dict[str, Any] = {"n_heads": 2, "n_kv_heads": 1, "head_dim": 16}
INF = float("inf")

CASES = (
    # Windows. Tiles have 64 keys in 16 bits and 32 in float32, or half as many; blocks 64 or 32 rows.
    Case("left", (70, 0, 3), (1, 9, 4), window=(5, None)),
    Case("left_over_tiles", (100, 0), (2, 90), window=(37, None), **SMALL),
    Case("left_and_right_causal", (70, 0, 3), (1, 9, 4), window=(5, 3)),
    Case("right", (70, 0, 3), (1, 9, 4), window=(None, 2), causal=False),
    Case("right_over_tiles", (3, 0), (2, 150), window=(None, 37), causal=False, **SMALL),
    Case("both", (70, 0, 3), (1, 9, 4), window=(2, 3), causal=False),
    Case("both_over_tiles", (100, 0), (2, 150), window=(20, 40), causal=False, **SMALL),
    Case("right_causal", (7, 0), (5, 9), window=(None, 2), dtypes=FP16),
    Case("own_key", (70, 0), (2, 9), window=(0, 0), causal=False),
    Case("own_key_causal", (70, 0), (2, 9), window=(0, None), dtypes=BF16),
    Case("no_bounds", (7, 0), (5, 9), window=(None, None), causal=False, dtypes=FP16),
    Case("wider_than_all", (7, 0), (5, 9), window=(1000, 1000), causal=False, dtypes=BF16),
    Case("wider_than_32_bits", (7, 0), (5, 9), window=(2**40, 2**40), causal=False, dtypes=FP16),
    Case("edges_of_tiles", (126, 127, 128, 129), (1, 1, 1, 1), window=(63, None), **SMALL),
    Case("pages_of_3", (70, 5), (3, 20), window=(7, 1), causal=False, page_size=3, dtypes=BF16),
    Case("pages_of_128", (300, 127), (1, 2), window=(130, None), page_size=128, dtypes=FP16),
    Case("without_tokens", (0, 40, 0, 9), (0, 3, 0, 0), window=(4, None), dtypes=FP16),
    Case("one_wide_head", (100,), (7,), window=(50, None), n_heads=1, n_kv_heads=1, head_dim=256),
    # Soft caps, for scores up to some tens.
    Case("cap", (70, 0, 3), (1, 9, 4), soft_cap=2.0),
    Case("cap_of_gemma", (40, 0), (2, 9), soft_cap=50.0, scale=0.7, head_dim=128),
    Case("cap_small", (40, 0), (2, 9), soft_cap=1e-3),
    Case("cap_large", (40, 0), (2, 9), soft_cap=1e4),
    Case("cap_smallest", (7, 0), (2, 3), soft_cap=2.0**-126, dtypes=FP32),
    Case("cap_beyond_scores", (7, 0), (2, 3), soft_cap=1e20, dtypes=FP32),
    Case("cap_scale_0", (7, 0), (2, 3), soft_cap=3.0, scale=0.0, dtypes=BF16),
    Case("cap_scale_negative", (7, 0), (2, 3), soft_cap=3.0, scale=-1.0, dtypes=FP16),
    Case("cap_not_causal", (7, 0, 40), (5, 9, 1), soft_cap=5.0, causal=False, head_dim=256),
    # Sinks.
    Case("sinks", (70, 0, 3), (1, 9, 4), sinks=(0.5, -1.0, 3.0, 8.0)),
    Case("sinks_narrow", (70, 0, 3), (1, 9, 4), sinks=(0.3, -1.1, 3.2, 8.0), narrow_sinks=True),
    Case("sinks_far", (40, 0), (2, 9), sinks=(60.0, -60.0, 90.0, -500.0), scale=0.05),
    Case("sinks_of_minus_infinity", (40, 0), (2, 9), sinks=(-INF, 2.0)),
    Case("sinks_of_seven", (9, 0), (11, 2), n_heads=7, n_kv_heads=1, sinks=tuple(range(-3, 4))),
    # Together.
    Case(
        "all", (100, 0, 3), (2, 70, 4), window=(9, None), soft_cap=4.0, sinks=(1.0, -2.0, 5.0, 0.0)
    ),
    Case(
        "all_not_causal",
        (90, 0, 3),
        (2, 70, 4),
        window=(33, 5),
        causal=False,
        soft_cap=7.0,
        sinks=(2.5, -2.0, 5.0),
        narrow_sinks=True,
        page_size=3,
        n_heads=6,
        head_dim=40,
    ),
    Case(
        "gpt_oss",
        (5000, 0, 1, 130),
        (1, 300, 64, 1),
        page_size=128,
        n_heads=64,
        n_kv_heads=8,
        window=(127, None),
        sinks=(0.5, -1.0, 3.0),
        gpu_only=True,
    ),
)
EVERYTHING: dict[str, Any] = {
    "window": (9, 4),
    "soft_cap": 4.0,
    "sinks": (1.0, -2.0, 5.0, 0.0),
    "causal": False,
}


def run(
    case: Case, kernels: KernelDevice, q: NDArray[Any], cache: PagedCache
) -> tuple[NDArray[Any], NDArray[Any]]:
    offsets, on_device = case.place(kernels, cache)
    options = case.options()
    if case.sinks is not None:
        options["sinks"] = kernels.asarray(options["sinks"])
    out, lse = ops.attention_ragged(
        kernels.asarray(q), offsets, on_device, case.layer_idx, return_lse=True, **options
    )
    return kernels.to_host(out), kernels.to_host(lse)


def assert_same(
    result: tuple[NDArray[Any], NDArray[Any]],
    expected: tuple[NDArray[Any], NDArray[Any]],
    rows: Any = slice(None),
) -> None:
    assert_bitwise_equal(result[0][rows], expected[0][rows], "output")
    assert_bitwise_equal(result[1][rows], expected[1][rows], "LSE")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(replace(case, dtype=dtype), id=f"{case.name}-{dtype}")
        for case in CASES
        for dtype in case.dtypes
    ],
)
def test_options(case: Case, kernels: KernelDevice, rng: np.random.Generator) -> None:
    if case.gpu_only and kernels.is_slow:
        pytest.skip("needs a GPU: too large for the emulator")
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    result = run(case, kernels, q, cache)
    check(case, kernels, q, cache, result)


# ---- Windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "causal", "expected"),
    [
        ((2, None), True, ["11100", "01110", "00111"]),
        ((1, 5), True, ["01100", "00110", "00011"]),
        ((1, 1), False, ["01110", "00111", "00011"]),
        ((0, 0), False, ["00100", "00010", "00001"]),
        ((None, 0), False, ["11100", "11110", "11111"]),
        ((None, 1), False, ["11110", "11111", "11111"]),
        ((2, None), False, ["11111", "01111", "00111"]),
    ],
)
def test_who_sees_whom(
    window: Any, causal: bool, expected: list[str], kernels: KernelDevice
) -> None:
    """With two cached keys and three new ones, each query averages the keys that it sees."""
    case = Case(
        "", (2,), (3,), n_heads=1, n_kv_heads=1, window=window, causal=causal, dtype=FLOAT32
    )
    cache = case.cache(np.random.default_rng(0))
    cache.blocks[cache.lookup_table[0, 0], 1, 1, :5, 0] = np.eye(5, 64)
    out, lse = run(case, kernels, np.zeros((3, 1, 64), np.float32), cache)
    seen = np.array([[int(mark) for mark in row] for row in expected])
    np.testing.assert_allclose(out[:, 0, :5], seen / seen.sum(axis=1, keepdims=True), rtol=3e-7)
    np.testing.assert_allclose(lse[:, 0], np.log(seen.sum(axis=1)), rtol=3e-7, atol=3e-7)


@each_dtype
@pytest.mark.parametrize("left", [0, 3, 31, 32, 64])
def test_nothing_before_the_window_of_a_token_is_read(
    left: int, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Neither NaN in keys and values, in the first tile of the window too, nor pages that were given away."""
    case = Case("", (101, 5), (1, 1), window=(left, None), page_size=8, sinks=(1.0,), dtype=dtype)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    expected = run(case, kernels, q, cache)
    for position in range(101 - left):
        page, slot = divmod(position, 8)
        cache.blocks[cache.lookup_table[0, page], :, 1, slot] = np.nan
    cache.lookup_table[0, : (101 - left) // 8] = len(cache.blocks)
    assert_same(run(case, kernels, q, cache), expected)
    assert kernels.take_errors() == ""


@each_dtype
def test_nothing_beyond_the_windows_of_a_block_is_read(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """On both sides: what only the rows of other blocks see reaches those alone."""
    case = Case("", (70,), (200,), window=(40, 3), causal=False, dtype=dtype, **SMALL)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    expected = run(case, kernels, q, cache)
    tokens = tiles.attention_block_m(tiles.attention_ragged(dtype, case.head_dim)) // 2
    before, after = 70 + tokens - 41, 70 + 2 * tokens + 3  # of the second block's windows
    for position in (before, after):
        page, slot = divmod(position, case.page_size)
        cache.blocks[cache.lookup_table[0, page], :, 1, slot] = np.nan
    result = run(case, kernels, q, cache)
    assert_same(result, expected, slice(tokens, 2 * tokens))
    for position in (before, after):
        rows = np.arange(max(position - 70 - 3, 0), min(position - 70 + 41, 200))
        assert np.isnan(result[0][rows]).all()
        assert np.isnan(result[1][rows]).all()


def test_a_window_costs_its_keys_only(
    kernels: KernelDevice, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million keys before the window: to walk over them takes the emulator longer than it waits."""
    case = Case("", (30,), (1,), page_size=32, window=(20, None), dtype=FLOAT16)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    expected = run(case, kernels, q, cache)
    pages = 2**15
    long = replace(
        cache,
        cache_lengths=cache.cache_lengths + np.uint32(pages * 32),
        lookup_table=np.repeat(cache.lookup_table[:, :1], pages + 1, axis=1),
    )
    if kernels.name == "emulator":
        monkeypatch.setattr(kernels.backend, "seconds", 5.0)
    assert_same(run(case, kernels, q, long), expected)


def test_windows_of_a_length_beyond_the_table(
    kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Sums of positions and windows that need more than 32 bits: all keys, and none."""
    case = Case("", (5,), (3,), page_size=4, causal=False, window=(None, 2**30), dtype=FLOAT32)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    cache = replace(cache, lookup_table=np.ascontiguousarray(cache.lookup_table[:, :2]))
    expected = run(case, kernels, q, cache)
    cache = replace(cache, cache_lengths=np.full(1, 2**31 - 1, np.uint32))
    assert_same(run(case, kernels, q, cache), expected)
    assert "page" in kernels.take_errors()
    out, lse = run(replace(case, window=(5, 2**30)), kernels, q, cache)
    assert "page" in kernels.take_errors()
    assert not out.any()
    assert (lse == -INF).all()


# ---- Soft caps --------------------------------------------------------------------------------------------


@each_dtype
def test_capped_scores_do_not_exceed_the_cap(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Scores of millions, and infinite ones, weigh as much as the cap: e**2 times as much as one of 0."""
    case = Case("", (3,), (1,), n_heads=1, n_kv_heads=1, soft_cap=2.0, scale=100.0, dtype=dtype)
    cache = case.cache(rng)
    page = cache.lookup_table[0, 0]
    cache.blocks[page, 0, 1, :4] = 0
    cache.blocks[page, 0, 1, :3, 0, 0] = [30000, -np.inf, np.inf]
    cache.blocks[page, 1, 1, :4, 0, :4] = np.eye(4)
    q = np.zeros((1, 1, 64), dtype)
    q[..., 0] = 1
    out, lse = run(case, kernels, q, cache)
    weights = np.exp([2.0, -2.0, 2.0, 0.0])
    np.testing.assert_allclose(lse[0, 0], np.log(weights.sum()), rtol=1e-6)
    np.testing.assert_allclose(
        out[0, 0, :4].astype(np.float64), weights / weights.sum(), rtol=2.0**-8
    )


@each_dtype
def test_a_cap_changes_no_mask(dtype: Any, kernels: KernelDevice, rng: np.random.Generator) -> None:
    """tanh(-inf) is -1: what is masked must be so afterwards, or keys that are not there would count."""
    case = Case("", (20, 0), (1, 3), soft_cap=1.0, dtype=dtype)
    _, lse = run(case, kernels, np.zeros((4, 4, 64), dtype), case.cache(rng))
    np.testing.assert_allclose(
        lse, np.log([[21.0], [1.0], [2.0], [3.0]]).repeat(4, 1), rtol=3e-7, atol=3e-7
    )


@each_dtype
def test_nan_is_not_capped(dtype: Any, kernels: KernelDevice, rng: np.random.Generator) -> None:
    case = Case("", (20, 5), (1, 3), soft_cap=3.0, dtype=dtype)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    cache.blocks[cache.lookup_table[0, 0], 0, 1, 7, 1, 3] = np.nan  # of query heads 2 and 3
    out, lse = run(case, kernels, q, cache)
    assert np.isnan(out[0, 2:]).all()
    assert np.isnan(lse[0, 2:]).all()
    assert np.isfinite(out[0, :2].astype(np.float32)).all()
    assert np.isfinite(out[1:].astype(np.float32)).all()


# ---- Sinks ------------------------------------------------------------------------------------------------


@each_dtype
def test_a_sink_is_a_key_whose_value_is_zero(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Seven keys and a sink of 0 average as eight keys do, the last of value 0, for queries of zero."""
    case = Case("", (6,), (1,), sinks=(0.0,), dtype=dtype)
    cache = case.cache(rng)
    page = cache.lookup_table[0, 0]
    cache.blocks[page, 1, 1, :7] = rng.integers(-8, 9, (7, 2, 64))
    out, lse = run(case, kernels, np.zeros((1, 4, 64), dtype), cache)
    values = cache.blocks[page, 1, 1, :7].astype(np.float32)
    assert_bitwise_equal(out[0], (values.sum(axis=0) / 8).repeat(2, axis=0).astype(dtype))
    np.testing.assert_allclose(lse, np.log(8.0), rtol=2e-7)


@each_dtype
@pytest.mark.parametrize("sink", [1e4, 1e30, 3e38, INF])
def test_a_huge_sink_takes_all(
    sink: float, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = Case("", (70, 0), (2, 9), sinks=(sink, -3.0), dtype=dtype)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    out, lse = run(case, kernels, q, cache)
    assert not out[:, ::2].any()
    # Beyond 2**128 / log2(e) the logit is infinite, and so is the LSE.
    expected = sink if sink < 2e38 else INF
    np.testing.assert_allclose(lse[:, ::2], np.float32(expected), rtol=3e-7)
    others = run(replace(case, sinks=(-3.0,)), kernels, q, cache)
    assert_same((out[:, 1::2], lse[:, 1::2]), (others[0][:, 1::2], others[1][:, 1::2]))
    assert np.abs(out[:, 1::2]).max() > 0.1


@each_dtype
@pytest.mark.parametrize("sink", [-1e30, -INF])
def test_a_sink_far_below_all_scores_changes_no_bit(
    sink: float, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = Case("", (70, 0), (2, 9), sinks=(sink,), dtype=dtype)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    assert_same(run(case, kernels, q, cache), run(replace(case, sinks=None), kernels, q, cache))


def test_a_sink_that_is_nan(kernels: KernelDevice, rng: np.random.Generator) -> None:
    case = Case("", (70, 0), (2, 9), sinks=(float("nan"), 0.0), dtype=FLOAT32)
    out, lse = run(case, kernels, case.rows(rng, case.n_heads), case.cache(rng))
    assert np.isnan(out[:, ::2]).all()
    assert np.isnan(lse[:, ::2]).all()
    assert np.isfinite(out[:, 1::2]).all()
    assert np.isfinite(lse[:, 1::2]).all()


@each_dtype
@pytest.mark.parametrize("sink", [0.0, 1e4, INF, -INF])
def test_rows_that_see_no_key_have_no_sink_either(
    sink: float, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Of a sequence without a valid page, and rows whose scores are -inf: 0, and an LSE of -inf."""
    case = Case("", (20, 6, 40), (1, 3, 1), sinks=(sink,), dtype=dtype)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    cache.blocks[cache.lookup_table[0, :2], 0, 1, :, :, 0] = -np.inf
    q[:1] = 0
    q[:1, :, 0] = 1
    cache.lookup_table[1] = len(cache.blocks)
    out, lse = run(case, kernels, q, cache)
    assert "page" in kernels.take_errors()
    assert_bitwise_equal(out[:4], np.zeros_like(out[:4]))
    assert (lse[:4] == -INF).all()
    assert (lse[4] > -INF).all()


# ---- Together ---------------------------------------------------------------------------------------------


@each_dtype
def test_a_sequence_in_other_batches(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """A sequence's rows have the same bits alone and beside others, before and after them."""
    case = Case("", (90, 2, 40), (5, 70, 1), page_size=8, dtype=dtype, **EVERYTHING)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    expected = run(case, kernels, q, cache)
    starts = row_offsets(case.new).astype(int)
    for order in ([0], [1], [2], [2, 1], [1, 0, 2], [0, 0, 1]):
        some = replace(
            case,
            cached=tuple(case.cached[b] for b in order),
            new=tuple(case.new[b] for b in order),
        )
        part = replace(
            cache,
            cache_lengths=cache.cache_lengths[np.array(order)],
            lookup_table=cache.lookup_table[np.array(order)],
        )
        rows = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in order])
        assert_same(run(some, kernels, q[rows], part), (expected[0][rows], expected[1][rows]))


def test_the_layout_of_pages_changes_no_bit(
    kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = Case("", (90, 2), (5, 20), page_size=8, dtype=bfloat16, **EVERYTHING)
    cache, q = case.cache(rng), case.rows(rng, case.n_heads)
    order = rng.permutation(len(cache.blocks))
    to = np.append(np.argsort(order), len(order)).astype(np.uint32)  # of each page, and of none
    moved = replace(cache, blocks=cache.blocks[order], lookup_table=to[cache.lookup_table])
    assert_same(run(case, kernels, q, moved), run(case, kernels, q, cache))
