"""Arrays of more than 2**31 elements: products of sizes are 64-bit. Needs a GPU with 24 GiB free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lorakit import ops
from lorakit.dtypes import bfloat16
from lorakit.nn import PagedKVCacheCollection
from lorakit.testing import activations, adapters, assert_bitwise_equal, rotary_table
from tests.conftest import KernelDevice
from tests.ops.helpers import CacheCase
from tests.ops.sgmv_cases import SgmvCase
from tests.ops.test_sgmv import test_lora as check_lora

ELEMENTS = 2**31


@pytest.fixture
def memory(gpu: Any) -> Any:
    """CuPy with an empty pool; skips where the memory does not suffice."""
    gpu.get_default_memory_pool().free_all_blocks()
    if gpu.cuda.runtime.memGetInfo()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    yield gpu
    gpu.get_default_memory_pool().free_all_blocks()


@pytest.mark.parametrize("op", ["store", "add", "rope", "rope_store", "attention"])
def test_a_cache_of_which_only_the_last_pages_are_live(
    op: str, memory: Any, rng: np.random.Generator
) -> None:
    """The same bits as with a small cache; pages beyond 65535, elements beyond 2**31."""
    case = CacheCase("", (40, 3), (2, 9), n_heads=8, dtype=bfloat16, num_layers=1, layer_idx=0)
    small = case.cache(rng)
    pages = 3 * ELEMENTS // (2 * small.blocks[0].size) + 1
    assert pages > 65536
    table = np.where(
        small.lookup_table < len(small.blocks),
        small.lookup_table + np.uint32(pages - len(small.blocks)),
        pages,
    ).astype(np.uint32)
    q, kv = memory.asarray(case.rows(rng, 8)), memory.asarray(case.rows(rng, 2))
    offsets, freqs = memory.asarray(case.offsets()), memory.asarray(rotary_table(64, 64))

    def run(blocks: Any, lookup_table: Any) -> tuple[Any, Any]:
        cache = PagedKVCacheCollection(
            blocks,
            memory.asarray(small.cache_lengths),
            memory.asarray(lookup_table),
            small.max_lengths,
        )
        calls: dict[str, Callable[[], Any]] = {
            "store": lambda: ops.store_kv(kv, kv, offsets, cache, 0),
            "add": lambda: ops.add_kv(kv, kv, offsets, cache, 0),
            "rope": lambda: ops.rope_ragged(q, offsets, cache, freqs, 0),
            "rope_store": lambda: ops.rope_store_kv(q, kv, kv, offsets, cache, freqs, 0),
            "attention": lambda: ops.attention_ragged(q, offsets, cache, 0),
        }
        return calls[op](), blocks[-len(small.blocks) :].get()

    large = memory.empty((pages, *small.blocks.shape[1:]), bfloat16)
    large.view(memory.uint16).fill(0x7FC0)  # NaN
    large[-len(small.blocks) :] = memory.asarray(small.blocks)
    expected, expected_blocks = run(memory.asarray(small.blocks), small.lookup_table)
    result, blocks = run(large, table)
    assert_bitwise_equal(blocks, expected_blocks)
    assert (large[: -len(small.blocks)].view(memory.uint16) == 0x7FC0).all()
    if expected is not None:
        assert_bitwise_equal(result, expected)


def test_rows_beyond_two_to_the_31_elements(memory: Any, rng: np.random.Generator) -> None:
    """Activations and result of 4.3 GB each; an adapter on the last rows only."""
    in_dim = out_dim = 4096
    rows = ELEMENTS // in_dim + 40
    made = adapters(2, 16, in_dim, out_dim, bfloat16, rng)
    lora_a = memory.asarray(made.lora_a)
    lora_b = memory.asarray(np.ascontiguousarray(made.lora_b.transpose(0, 2, 1))).transpose(0, 2, 1)
    tail = memory.asarray(activations((35, in_dim), bfloat16, rng))
    x = memory.zeros((rows, in_dim), bfloat16)
    x[-35:] = tail
    ids = np.array([-1, 1], np.int32)
    y = ops.sgmv_lora(x, lora_a, lora_b, ids, None, np.array([0, rows - 35, rows], np.int32))
    expected = ops.sgmv_lora(tail, lora_a, lora_b, ids, None, np.array([0, 0, 35], np.int32))
    assert_bitwise_equal(y[-35:], expected)
    assert np.abs(expected.get().astype(np.float32)).max() > 0.1
    assert not y[:-35].view(memory.uint16).any()


@pytest.mark.parametrize("rows", [2**20, 4096])
def test_as_many_adapters_and_ranks_as_there_may_be(
    rows: int, memory: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """4096 slots of ranks 0 to 512, a million rows or one for each, and base rows among them."""
    slots = 4096
    lengths = rng.multinomial(rows, rng.dirichlet(np.ones(slots))) if rows > slots else [1] * slots
    ids = np.where(rng.random(slots) < 0.1, -1, rng.permutation(slots))
    case = SgmvCase(
        "many",
        tuple(zip(ids.tolist(), np.asarray(lengths).tolist(), strict=True)),
        in_dim=64,
        rank=512,
        ranks=tuple(rng.integers(0, 513, slots).tolist()),
        slots=slots,
        y="plain",
        ranks_from="slots",
        dtype=bfloat16,
    )
    assert case.item_rows == (128 if rows == 2**20 else 16)
    check_lora(case, kernels, rng)


def test_a_stride_between_rows_beyond_two_to_the_31_elements(
    memory: Any, rng: np.random.Generator
) -> None:
    """Three queries, 2**30 + 8 elements from one to the next."""
    case = CacheCase("", (5,), (3,), n_heads=2, dtype=bfloat16, num_layers=1, layer_idx=0)
    small = case.cache(rng)
    cache = PagedKVCacheCollection(
        memory.asarray(small.blocks),
        memory.asarray(small.cache_lengths),
        memory.asarray(small.lookup_table),
        small.max_lengths,
    )
    q = case.rows(rng, 2)
    stride = ELEMENTS // 2 + 8
    whole = memory.empty(2 * stride + 128, bfloat16)
    far = memory.ndarray((3, 2, 64), bfloat16, whole.data, strides=(2 * stride, 128, 2))
    far[...] = memory.asarray(q)
    offsets = memory.asarray(case.offsets())
    assert_bitwise_equal(
        ops.attention_ragged(far, offsets, cache, 0),
        ops.attention_ragged(memory.asarray(q), offsets, cache, 0),
    )
    freqs = memory.asarray(rotary_table(8, 64))
    again = replace(cache, blocks=cache.blocks.copy())
    assert_bitwise_equal(
        ops.rope_ragged(far, offsets, cache, freqs, 0),
        ops.rope_ragged(memory.asarray(q), offsets, again, freqs, 0),
    )
