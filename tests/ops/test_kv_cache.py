"""store_kv and add_kv: every bit of the cache is known, so the whole of it is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from lorakit import ops, reference, tiles
from lorakit.dtypes import bfloat16
from lorakit.testing import assert_bitwise_equal
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
    float32_delta: bool = False

    @property
    def delta_dtype(self) -> Any:
        return np.dtype(np.float32) if self.float32_delta else self.dtype

    def store_instances(self) -> set[Instance]:
        return {tiles.store_kv(self.dtype)} if self.total_tokens else set()

    def add_instances(self) -> set[Instance]:
        return {tiles.add_kv(self.dtype, self.delta_dtype)} if self.total_tokens else set()


CASES = (
    Case("prefill", (0, 0, 0), (5, 1, 3)),
    Case("float32_delta", (3, 0), (2, 4), float32_delta=True),
    Case("decode", (7, 31, 15, 16), (1, 1, 1, 1)),  # the last page full, one token on the last page
    Case("mixed", (40, 0, 3), (1, 18, 4), n_kv_heads=8, float32_delta=True, dtypes=BF16),
    Case("empty_sequences", (0, 4, 0, 9, 2), (0, 3, 0, 2, 0)),
    Case("no_tokens", (4, 0), (0, 0), dtypes=BF16),
    Case("no_sequences", (), (), dtypes=BF16),
    Case("page_size_1", (2, 0), (3, 4), page_size=1),
    Case("page_size_3", (2, 3, 0), (3, 1, 7), page_size=3, dtypes=FP16),
    Case("page_size_128", (127, 0, 128), (3, 129, 1), page_size=128, dtypes=BF16),
    Case("prefix_sharing", (16, 18, 20), (4, 1, 2), page_size=8, shared_pages=2, dtypes=BF16),
    Case("one_head_of_8", (3, 0), (2, 20), n_kv_heads=1, head_dim=8),
    Case("head_dim_40", (5,), (3,), n_kv_heads=3, head_dim=40, dtypes=FP16),
    Case("head_dim_256", (5, 1), (3, 2), head_dim=256, dtypes=BF16),
    Case("first_of_three_layers", (2, 5), (3, 3), num_layers=3, layer_idx=0, dtypes=FP16),
    Case("fused_projection", (2, 5), (3, 3), strided=True, float32_delta=True),
    Case("int32_metadata", (2, 5), (3, 3), metadata=np.int32, dtypes=BF16),
    Case("host_metadata", (2, 5), (3, 3), host_metadata=True, dtypes=BF16),
    Case(
        "llama",
        (3000, 0, 77),
        (1, 2000, 513),
        page_size=128,
        n_kv_heads=8,
        head_dim=128,
        gpu_only=True,
    ),
)


def place_rows(case: Case, kernels: KernelDevice, k: Any, v: Any) -> tuple[Any, Any]:
    """On the device; strided, with different strides of keys and of values."""
    if not case.strided:
        return kernels.asarray(k), kernels.asarray(v)
    placed = side_by_side(kernels, v, k)[1], side_by_side(kernels, k, v, v)[1]
    assert placed[0].strides != placed[1].strides
    return placed


@parameters(CASES, Case.store_instances)
def test_store(case: Case, kernels: KernelDevice, rng: np.random.Generator) -> None:
    skip_where_slow(case, kernels)
    cache = case.cache(rng, store_new=False)
    k, v = case.rows(rng, case.n_kv_heads), case.rows(rng, case.n_kv_heads)
    offsets, on_device = case.place(kernels, cache)
    with launches(kernels) as seen:
        rows = place_rows(case, kernels, k, v)
        ops.store_kv(rows[0], rows[1], offsets, on_device, case.layer_idx)
    assert seen == case.store_instances()
    expected = cache.copy()
    reference.store_kv(k, v, case.offsets(), expected, case.layer_idx)
    changed = step_slots(case, cache, 0) | step_slots(case, cache, 1)
    assert changed.sum() == k.size + v.size
    assert_bitwise_equal(expected.blocks[~changed], cache.blocks[~changed], "what has no token")
    assert_bitwise_equal(on_device.blocks, expected.blocks, "the cache")


@parameters(CASES, Case.add_instances)
def test_add(case: Case, kernels: KernelDevice, rng: np.random.Generator) -> None:
    skip_where_slow(case, kernels)
    cache = case.cache(rng)
    k, v = (case.rows(rng, case.n_kv_heads, case.delta_dtype) for _ in "kv")
    offsets, on_device = case.place(kernels, cache)
    with launches(kernels) as seen:
        rows = place_rows(case, kernels, k, v)
        ops.add_kv(rows[0], rows[1], offsets, on_device, case.layer_idx)
    assert seen == case.add_instances()
    expected = cache.copy()
    reference.add_kv(k, v, case.offsets(), expected, case.layer_idx)
    assert_bitwise_equal(
        on_device.blocks, expected.blocks, "the cache"
    )  # one float32 sum, one rounding


@each_dtype
def test_adding_negative_zero_keeps_every_bit(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    case = Case("", (3,), (4,), dtype=dtype)
    cache = case.cache(rng)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)  # type: ignore[no-untyped-call]
    word = np.dtype(f"u{dtype.itemsize}")
    nan = 0xFFC00001 if dtype.itemsize == 4 else 0xFE01 if dtype == FLOAT16 else 0xFF81  # payloads
    kept = np.array([-0.0, 0, tiny, -3 * tiny, 1, np.inf], dtype).view(word)
    words = rng.choice(np.append(kept, np.array(nan, word)), cache.blocks.shape)
    cache.blocks[...] = words.view(dtype)
    delta = np.full((4, case.n_kv_heads, case.head_dim), -0.0, np.float32)
    offsets, on_device = case.place(kernels, cache)
    ops.add_kv(kernels.asarray(delta), kernels.asarray(delta), offsets, on_device, 1)
    assert_bitwise_equal(on_device.blocks, cache.blocks)


@pytest.mark.parametrize("tail", [1, 2, 3])
@pytest.mark.parametrize("host_metadata", [False, True])
def test_add_to_the_last_sequences(
    tail: int, host_metadata: bool, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """MAX's own case: a cache of ones; only the chosen sequences change, only at their new positions."""
    case = Case(
        "",
        (40, 30, 20, 10),
        (10, 20, 30, 40),
        page_size=128,
        n_kv_heads=8,
        head_dim=128,
        dtype=bfloat16,
    )
    cache = case.cache(rng)
    cache.blocks[...] = 1
    rows = int(case.offsets()[-1] - case.offsets()[tail])
    kv = rng.standard_normal((rows, 2 * 8 * 128)).astype(bfloat16)
    whole = kernels.asarray(kv)  # the first half of a row is the key, the second the value
    k, v = (whole[:, half : half + 1024].reshape(rows, 8, 128) for half in (0, 1024))
    offsets, on_device = case.place(kernels, cache)
    if host_metadata:
        offsets = case.offsets()
    ops.add_kv(k, v, offsets[tail:], on_device, 1, batch_offset=tail)

    after = kernels.to_host(on_device.blocks)
    row = 0
    for b in range(tail, 4):
        page = cache.lookup_table[b, 0]
        for i in range(case.new[b]):
            sums = (1 + kv[row].astype(np.float32)).astype(bfloat16).reshape(2, 8, 128)
            assert_bitwise_equal(after[page, :, 1, case.cached[b] + i], sums)
            after[page, :, 1, case.cached[b] + i] = 1
            row += 1
    assert row == rows
    assert_bitwise_equal(after, cache.blocks, "everything else")
