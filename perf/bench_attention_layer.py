"""A step of the attention layer with an adapter on each sequence, against the same layer without any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lorakit.demo.checks import attention_budget, within
from lorakit.demo.oracle import MergedAttention, StepOnHost
from lorakit.demo.weights import Adapter, BlockWeights, projections
from lorakit.demo.workload import Request
from lorakit.nn import AttentionWithRopeAndLoRA, DType, KVCacheParams, RotaryEmbedding
from lorakit.testing import MODELS, PagedCache, count_bytes, lora_batch, row_offsets, to_host, widen
from perf.harness import Baseline, Place, Work, cases, measure, random_array
from perf.inputs import device_rows, random_cache


@dataclass(frozen=True)
class Case:
    """`sequences` of `new` tokens each behind `cached` ones, one adapter for each."""

    model: str
    sequences: int
    new: int
    cached: int
    slots: int
    rank: int
    page_size: int = 16

    def __str__(self) -> str:
        batch = f"{self.sequences}x{self.new}-onto-{self.cached}"
        return f"{self.model}-{batch}-L{self.slots}-R{self.rank}"


CPU = [Case("tiny", 3, 1, 20, 2, 4, 4), Case("tiny", 2, 9, 0, 2, 8)]
GPU = [
    Case("llama-3-8b", 1, 1, 1024, 8, 16),
    Case("llama-3-8b", 16, 1, 1024, 8, 16),
    Case("llama-3-8b", 64, 1, 1024, 32, 16),
    Case("llama-3-8b", 64, 1, 1024, 32, 64),
    Case("qwen2-7b", 64, 1, 1024, 8, 16),
    Case("llama-3-8b", 4, 1024, 0, 4, 16),
    Case("llama-3-8b", 4, 2048, 0, 4, 64),
]
THETA = 500000.0


@pytest.mark.parametrize("case", cases(CPU, GPU), ids=str)
def test_attention_layer(
    case: Case, place: Place, rng: np.random.Generator, benchmark: Any
) -> None:
    shape = MODELS[case.model]
    weights = _weights(case, place.dtype, rng)
    new, cached = [case.new] * case.sequences, [case.cached] * case.sequences
    heads = (shape.n_kv_heads, shape.head_dim)
    cache = random_cache(cached, new, case.page_size, *heads, place.dtype, rng)
    x_host = random_array((sum(new), shape.hidden_size), place.dtype, rng)
    lora = lora_batch(f"seg{case.new}", sum(new), case.slots, rng, slot_ranks=case.rank)

    with_adapters, table = _layer(case, place, weights)
    without, _ = _layer(case, place, weights)
    with_adapters.set_lora_batch_info(*(place.asarray(array) for array in lora.metadata))
    x, offsets, kv = place.asarray(x_host), place.asarray(row_offsets(new)), place.cache(cache)

    def call() -> Any:
        return with_adapters(0, x, kv, table, offsets)

    got, share = to_host(call()), 0.0
    for b in sorted({0, case.sequences - 1}):
        rows = slice(b * case.new, (b + 1) * case.new)
        share = max(share, _check(case, weights, cache, x_host[rows], got[rows], b, lora.lora_ids))

    measure(
        benchmark,
        place,
        call,
        _work(case, weights, cache, x_host, np.unique(lora.lora_ids)),
        Baseline("no adapters", lambda: without(0, x, kv, table, offsets)),
        share,
    )


def _weights(case: Case, dtype: Any, rng: np.random.Generator) -> BlockWeights:
    shape = MODELS[case.model]
    sizes = {name: size for name, size in projections(shape).items() if name in "qkvo"}
    rank = case.rank
    return BlockWeights(
        shape,
        np.dtype(dtype),
        {name: random_array((n, k), dtype, rng, k**-0.5) for name, (k, n) in sizes.items()},
        tuple(
            Adapter(
                rank,
                float(rank),
                {
                    name: random_array((rank, k), dtype, rng, k**-0.5)
                    for name, (k, _) in sizes.items()
                },
                {
                    name: random_array((n, rank), dtype, rng, 0.5 * rank**-0.5)
                    for name, (_, n) in sizes.items()
                },
            )
            for _ in range(case.slots)
        ),
    )


def _layer(case: Case, place: Place, weights: BlockWeights) -> tuple[AttentionWithRopeAndLoRA, Any]:
    """The layer, and its rotary table."""
    shape, dtype, device = weights.shape, DType.from_numpy(weights.dtype), place.device
    rope = RotaryEmbedding(
        shape.hidden_size,
        shape.n_heads,
        THETA,
        case.cached + case.new,
        device,
        head_dim=shape.head_dim,
        interleaved=False,
    )
    layer = AttentionWithRopeAndLoRA(
        rope=rope,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        hidden_size=shape.hidden_size,
        kv_params=KVCacheParams(dtype, shape.n_kv_heads, shape.head_dim, page_size=case.page_size),
        devices=[device],
        dtype=dtype,
        max_num_loras=case.slots,
        max_lora_rank=case.rank,
    )
    layer.load_state_dict({f"{name}_proj.weight": base for name, base in weights.base.items()})
    for name in weights.base:
        for slot, adapter in enumerate(weights.adapters):
            getattr(layer, f"{name}_proj").set_adapter(slot, adapter.a[name], adapter.b[name])
    return layer, rope.freqs_cis


def _check(
    case: Case,
    weights: BlockWeights,
    cache: PagedCache,
    x: Any,
    got: Any,
    sequence: int,
    lora_ids: Any,
) -> float:
    """One sequence against merged weights in float64; the share of its budget."""
    request = Request("r", int(lora_ids[sequence]), case.new)
    twin = MergedAttention(weights, np.random.default_rng(0))
    exact = twin.share()
    if case.cached:
        keys, values = widen(device_rows(cache.blocks, cache, sequence, 0, case.cached))
        for oracle in (exact, twin):
            oracle.remember("r", keys, values)
    nothing = np.zeros((1, 1), np.uint32)
    groups = (np.zeros(1, np.int32), nothing[0], nothing[0])
    step = StepOnHost([request], widen(x), row_offsets([case.new]), nothing[0], nothing, groups)
    y, budget = attention_budget(exact, twin, step)
    check = within("attention, merged", got, y, budget)
    assert not check.problem, check.problem
    return check.share


def _work(case: Case, weights: BlockWeights, cache: PagedCache, x: Any, used: Any) -> Work:
    """Weights, adapters in use, rows in and out, cached tokens read, new ones written; all products."""
    adapters = [weights.adapters[slot] for slot in used]
    matrices = list(weights.base.values())
    factors = [f for adapter in adapters for f in (*adapter.a.values(), *adapter.b.values())]
    tokens = case.sequences * (case.cached + case.new)
    moved = count_bytes(*matrices, *factors, x, x) + tokens * count_bytes(
        cache.blocks[:1, :, :, :1]
    )
    per_row = sum(2 * matrix.size for matrix in matrices)
    per_row += sum(2 * case.rank * sum(matrix.shape) for matrix in matrices)
    shape, n, c = weights.shape, case.new, case.cached
    pairs = case.sequences * (n * c + n * (n + 1) // 2)
    return Work(moved, len(x) * per_row + 4 * shape.head_dim * shape.n_heads * pairs)
