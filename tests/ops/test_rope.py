"""rope_ragged, and rope_store_kv, which stores too: exact rotations; what is not rotated keeps its bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit import ops, reference, tiles
from lorakit.dtypes import bfloat16
from lorakit.testing import (
    assert_bitwise_equal,
    assert_within_budget,
    rope_terms,
    rotary_table,
    widen,
)
from lorakit.tiles import Instance
from tests.ops.helpers import (
    FLOAT16,
    CacheCase,
    each_dtype,
    launches,
    parameters,
    side_by_side,
    skip_where_slow,
    step_slots,
)

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

BF16, FP16 = (bfloat16,), (FLOAT16,)


@dataclass(frozen=True)
class Case(CacheCase):
    rotary_dim: int = 0
    """0: the whole head."""
    interleaved: bool = True
    rotate_last: bool = False

    @property
    def rotated(self) -> slice:
        """The rotated part of a head."""
        width = self.rotary_dim or self.head_dim
        return slice(self.head_dim - width, None) if self.rotate_last else slice(width)

    def instances(self) -> set[Instance]:
        width = self.rotary_dim or self.head_dim
        tile = tiles.rope_ragged(self.dtype, self.head_dim, width, self.interleaved)
        return {tile} if self.total_tokens else set()

    def store_instances(self) -> set[Instance]:
        width = self.rotary_dim or self.head_dim
        tile = tiles.rope_store_kv(self.dtype, self.head_dim, width, self.interleaved)
        return {tile} if self.total_tokens else set()


CASES = (
    Case("interleaved", (3, 0, 17), (2, 5, 1)),
    Case("halves", (3, 0, 17), (2, 5, 1), interleaved=False),
    Case("head_dim_8", (3, 0), (2, 5), head_dim=8),
    Case("head_dim_8_halves", (3, 0), (2, 5), head_dim=8, interleaved=False),
    Case("head_dim_40", (1, 0), (2, 5), head_dim=40, dtypes=FP16),
    Case("head_dim_72", (1, 0), (2, 5), head_dim=72, interleaved=False, dtypes=BF16),
    Case("head_dim_80", (1, 0), (2, 5), head_dim=80, dtypes=BF16),
    Case("head_dim_96", (1, 0), (2, 5), head_dim=96, dtypes=FP16),
    Case("head_dim_112", (1, 0), (2, 5), head_dim=112, interleaved=False, dtypes=FP16),
    Case("head_dim_128", (1, 0), (2, 5), head_dim=128, interleaved=False, dtypes=BF16),
    Case("head_dim_192", (1, 0), (2, 5), head_dim=192, dtypes=BF16),
    Case("head_dim_256", (1, 0), (2, 5), head_dim=256, dtypes=FP16),
    # Part of a head: 8, 4 and 1 pairs to a thread.
    Case("first_32", (3, 8), (2, 1), rotary_dim=32, interleaved=False),
    Case("last_32", (3, 8), (2, 1), rotary_dim=32, rotate_last=True),
    Case("last_24_halves", (3, 8), (2, 1), rotary_dim=24, interleaved=False, rotate_last=True),
    Case("first_2", (3, 8), (2, 1), rotary_dim=2),
    Case("first_6_halves", (3, 8), (2, 1), rotary_dim=6, interleaved=False),
    Case(
        "last_10_of_40", (3, 8), (2, 1), head_dim=40, rotary_dim=10, rotate_last=True, dtypes=BF16
    ),
    Case(
        "phi_40_of_80", (3, 8), (2, 1), head_dim=80, rotary_dim=40, interleaved=False, dtypes=FP16
    ),
    # Batches and caches.
    Case("one_token", (0,), (1,), dtypes=FP16),
    Case("decode", (7, 31, 15, 16), (1, 1, 1, 1), dtypes=BF16),
    Case("empty_sequences", (0, 4, 0, 9, 2), (0, 3, 0, 2, 0)),
    Case("no_tokens", (4, 0), (0, 0), dtypes=BF16),
    Case("no_sequences", (), (), dtypes=BF16),
    Case("page_size_1", (2, 0), (3, 4), page_size=1, dtypes=FP16),
    Case("page_size_3", (2, 3, 0), (3, 1, 7), page_size=3, dtypes=BF16),
    Case("page_size_128", (127, 0), (3, 129), page_size=128, n_heads=1, n_kv_heads=1, dtypes=BF16),
    Case("prefix_sharing", (16, 18, 20), (4, 1, 2), page_size=8, shared_pages=2, dtypes=BF16),
    Case("seven_heads_on_one", (2, 5), (3, 3), n_heads=7, n_kv_heads=1, dtypes=FP16),
    # More heads than a pass of a block of rope_store_kv takes, which are 16 of head dim 128, 1 of 256.
    Case("forty_heads", (2, 5), (2, 1), n_heads=40, n_kv_heads=5, head_dim=128, dtypes=BF16),
    Case("a_pass_per_head", (2,), (2,), head_dim=256, rotary_dim=6, interleaved=False, dtypes=FP16),
    # More sequences than a warp has lanes, and than its square.
    Case(
        "many_sequences",
        (3, 0, 7) * 23,
        (1, 0, 2) * 23,
        n_heads=1,
        n_kv_heads=1,
        head_dim=8,
        dtypes=FP16,
    ),
    Case(
        "thousands_of_sequences",
        (1,) * 2100,
        (0,) * 1030 + (2, 0, 1) + (0,) * 1067,
        page_size=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=8,
        num_layers=1,
        layer_idx=0,
        dtypes=BF16,
    ),
    # So many tokens that a block of rope_store_kv makes several passes; 5 in two blocks: 3 and 2.
    Case(
        "several_passes",
        (1, 0),
        (500, 40),
        n_heads=3,
        n_kv_heads=1,
        head_dim=256,
        rotary_dim=2,
        num_layers=1,
        layer_idx=0,
        dtypes=BF16,
    ),
    Case("fused_projection", (2, 5), (3, 3), strided=True),
    Case("first_of_three_layers", (2, 5), (3, 3), num_layers=3, layer_idx=0, dtypes=FP16),
    Case("int32_metadata", (2, 5), (3, 3), metadata=np.int32, dtypes=BF16),
    Case("host_metadata", (2, 5), (3, 3), host_metadata=True, dtypes=BF16),
    Case(
        "llama",
        (3000, 0, 16000),
        (1, 2000, 72),
        page_size=128,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        interleaved=False,
        gpu_only=True,
    ),
)


@parameters(CASES, Case.instances)
def test_rope(case: Case, kernels: KernelDevice, rng: np.random.Generator) -> None:
    skip_where_slow(case, kernels)
    cache = case.cache(rng)
    q = case.rows(rng, case.n_heads)
    positions = max((a + b for a, b in zip(case.cached, case.new, strict=True)), default=1)
    table = rotary_table(positions, case.rotary_dim or case.head_dim)
    order: dict[str, Any] = {"interleaved": case.interleaved, "rotate_last": case.rotate_last}
    offsets, on_device = case.place(kernels, cache)
    if case.strided:
        k = case.rows(rng, case.n_kv_heads)
        q_on_device = side_by_side(kernels, q, k, k)[0]
        assert q_on_device.strides[0] > q.strides[0]
    else:
        q_on_device = kernels.asarray(q)

    with launches(kernels) as seen:
        out = ops.rope_ragged(
            q_on_device, offsets, on_device, kernels.asarray(table), case.layer_idx, **order
        )
    assert seen == case.instances()
    assert_bitwise_equal(q_on_device, q, "the argument")
    assert out.flags.c_contiguous

    exact = cache.widened()
    arguments = (case.offsets(), exact, table, case.layer_idx)
    exact_q = reference.rope_ragged(widen(q), *arguments, **order)
    terms_q, terms_k = rope_terms(q, case.offsets(), cache, table, case.layer_idx, **order)
    assert_within_budget(out, exact_q, case.dtype, terms_q, length=2, name="queries")
    assert_within_budget(
        on_device.blocks, exact.blocks, case.dtype, terms_k, length=2, name="cache"
    )

    copied = np.ones(case.head_dim, np.bool_)
    copied[case.rotated] = False
    assert_bitwise_equal(
        kernels.to_host(out)[..., copied], q[..., copied], "the rest of the queries"
    )
    untouched = ~step_slots(case, cache, 0) | copied
    assert_bitwise_equal(
        kernels.to_host(on_device.blocks)[untouched],
        cache.blocks[untouched],
        "the rest of the cache",
    )


@parameters(CASES, Case.store_instances)
def test_rope_store(case: Case, kernels: KernelDevice, rng: np.random.Generator) -> None:
    """Within the budget of one rounding, and bit for bit what store_kv and rope_ragged give."""
    skip_where_slow(case, kernels)
    cache = case.cache(rng, store_new=False)
    q, k, v = (case.rows(rng, n) for n in (case.n_heads, case.n_kv_heads, case.n_kv_heads))
    positions = max((a + b for a, b in zip(case.cached, case.new, strict=True)), default=1)
    table = rotary_table(positions, case.rotary_dim or case.head_dim)
    order: dict[str, Any] = {"interleaved": case.interleaved, "rotate_last": case.rotate_last}
    offsets, on_device = case.place(kernels, cache)
    if case.strided:
        q_there, k_there = side_by_side(kernels, q, k, v)[0], side_by_side(kernels, v, k)[1]
        v_there = side_by_side(kernels, k, q, v, k)[2]
        assert len({array.strides[0] for array in (q_there, k_there, v_there)}) == 3
    else:
        q_there, k_there, v_there = map(kernels.asarray, (q, k, v))

    table_on_device = kernels.asarray(table)
    with launches(kernels) as seen:
        out = ops.rope_store_kv(
            q_there,
            k_there,
            v_there,
            offsets,
            on_device,
            table_on_device,
            case.layer_idx,
            **order,
        )
    assert seen == case.store_instances()
    for array, given in ((q_there, q), (k_there, k), (v_there, v)):
        assert_bitwise_equal(array, given, "the argument")
    assert out.flags.c_contiguous

    changed = step_slots(case, cache, 0) | step_slots(case, cache, 1)
    assert changed.sum() == k.size + v.size
    blocks = kernels.to_host(on_device.blocks)
    assert_bitwise_equal(blocks[~changed], cache.blocks[~changed], "what has no token")

    stored = cache.copy()
    reference.store_kv(k, v, case.offsets(), stored, case.layer_idx)
    exact, layer = stored.widened(), case.layer_idx
    exact_q = reference.rope_store_kv(
        widen(q), widen(k), widen(v), case.offsets(), exact, table, layer, **order
    )
    terms_q, terms_k = rope_terms(q, case.offsets(), stored, table, layer, **order)
    assert_within_budget(out, exact_q, case.dtype, terms_q, length=2, name="queries")
    assert_within_budget(blocks, exact.blocks, case.dtype, terms_k, length=2, name="cache")

    offsets, other = case.place(kernels, cache)
    ops.store_kv(k_there, v_there, offsets, other, layer)
    other_out = ops.rope_ragged(q_there, offsets, other, table_on_device, layer, **order)
    assert_bitwise_equal(out, other_out, "queries")
    assert_bitwise_equal(blocks, other.blocks, "the cache")


@each_dtype
def test_the_rest_of_a_head_is_copied_whatever_it_holds(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Negative zeros, infinities and every kind of NaN pass beside a rotation, bit for bit."""
    case = Case("", (3, 0), (2, 3), dtype=dtype, rotary_dim=16)
    cache = case.cache(rng)
    word = np.dtype(f"u{dtype.itemsize}")
    q = rng.integers(0, 2 ** (8 * dtype.itemsize), (5, 4, 64), word).view(dtype)
    q[..., :16] = 1
    cache.blocks[:, 0, 1, :, :, 16:] = rng.integers(
        0, 2 ** (8 * dtype.itemsize), cache.blocks[:, 0, 1, :, :, 16:].shape, word
    ).view(dtype)
    offsets, on_device = case.place(kernels, cache)
    out = ops.rope_ragged(
        kernels.asarray(q), offsets, on_device, kernels.asarray(rotary_table(8, 16)), 1
    )
    assert_bitwise_equal(kernels.to_host(out)[..., 16:], q[..., 16:])
    assert_bitwise_equal(kernels.to_host(on_device.blocks)[..., 16:], cache.blocks[..., 16:])


@each_dtype
def test_the_rest_of_a_key_and_values_are_stored_whatever_they_hold(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = Case("", (3, 0), (2, 3), dtype=dtype, rotary_dim=16)
    cache = case.cache(rng, store_new=False)
    word = np.dtype(f"u{dtype.itemsize}")
    q = case.rows(rng, case.n_heads)
    k, v = rng.integers(0, 2 ** (8 * dtype.itemsize), (2, 5, 2, 64), word).view(dtype)
    k[..., :16] = 1
    offsets, on_device = case.place(kernels, cache)
    table = kernels.asarray(rotary_table(8, 16))
    q, k_there, v_there = map(kernels.asarray, (q, k, v))
    ops.rope_store_kv(q, k_there, v_there, offsets, on_device, table, 1)
    reference.store_kv(k, v, case.offsets(), cache, 1)
    blocks = kernels.to_host(on_device.blocks)
    assert_bitwise_equal(blocks[:, 1], cache.blocks[:, 1], "values")
    assert_bitwise_equal(blocks[:, 0, ..., 16:], cache.blocks[:, 0, ..., 16:], "keys")


def test_position_0_does_not_rotate(kernels: KernelDevice, rng: np.random.Generator) -> None:
    case = Case("", (0, 0), (1, 1), dtype=np.dtype(np.float32))
    cache = case.cache(rng)
    q = case.rows(rng, case.n_heads)
    offsets, on_device = case.place(kernels, cache)
    out = ops.rope_ragged(
        kernels.asarray(q), offsets, on_device, kernels.asarray(rotary_table(1, 64)), 1
    )
    assert_bitwise_equal(out, q)
    assert_bitwise_equal(on_device.blocks, cache.blocks)
