"""Attention over the paged cache, from decode of long sequences to prefill.

Baselines on a GPU: a copy of the same bytes where bytes make the floor; where operations do, the two
products of each sequence and key head by cuBLAS, dense, without mask or softmax. On the CPU plain NumPy,
dense, all queries of a sequence at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lorakit import ops, reference
from lorakit.testing import (
    MODELS,
    ModelShape,
    PagedCache,
    assert_within_budget,
    attention_error,
    count_bytes,
    row_offsets,
    to_host,
    widen,
)
from perf.harness import Baseline, Place, Work, cases, copy_of, measure, random_array
from perf.inputs import device_rows, one_sequence, random_cache, some_sequences


@dataclass(frozen=True)
class Case:
    """New and cached tokens of each sequence, by a name."""

    model: str
    name: str
    new: tuple[int, ...]
    cached: tuple[int, ...]
    page_size: int = 16

    def __str__(self) -> str:
        return f"{self.model}-{self.name}-page{self.page_size}"


def batch(model: str, sequences: int, new: int, cached: int, page_size: int = 16) -> Case:
    """Equal sequences."""
    name = f"{sequences}x{new}-onto-{cached}"
    return Case(model, name, (new,) * sequences, (cached,) * sequences, page_size)


# 48 sequences of 64 to 8192 tokens, in no order.
RAGGED = tuple(int(n) for n in np.random.default_rng(48).permutation(np.geomspace(64, 8192, 48)))

CPU = [
    batch("tiny", 2, 1, 40, 4),
    batch("tiny", 2, 12, 0),
    Case("tiny", "mixed", (9, 1, 1), (0, 30, 17)),
]
GPU = [
    batch("llama-3-8b", 1, 1, 1024),
    batch("llama-3-8b", 1, 1, 8192),
    batch("llama-3-8b", 1, 1, 32768),
    batch("llama-3-8b", 16, 1, 1024),
    batch("llama-3-8b", 16, 1, 8192),
    *(batch("llama-3-8b", 64, 1, 4096, page_size) for page_size in (1, 16, 64, 128)),
    batch("llama-3-8b", 256, 1, 1024),
    # Groups of 8, 7 and 1 heads; heads of 64 and of 256.
    batch("llama-3-70b", 64, 1, 1024),
    batch("qwen2-7b", 16, 1, 4096),
    batch("llama-2-7b", 16, 1, 2048),
    batch("llama-3.2-1b", 64, 1, 4096),
    batch("gemma-2-9b", 16, 1, 4096),
    Case("llama-3-8b", "decode-48-ragged", (1,) * 48, RAGGED),
    batch("llama-3-8b", 64, 4, 4096),
    batch("llama-3-8b", 32, 512, 0),
    batch("llama-3-8b", 16, 1024, 0),
    batch("llama-3-8b", 4, 4096, 0),
    batch("llama-3-8b", 4, 4096, 0, 128),
    batch("llama-3-8b", 8, 512, 8192),
    batch("llama-3.2-1b", 4, 4096, 0),
    batch("gemma-2-9b", 4, 4096, 0),
    Case("llama-3-8b", "4x1024-and-60-decodes", (1024,) * 4 + (1,) * 60, (0,) * 4 + (1024,) * 60),
]


@pytest.mark.parametrize("case", cases(CPU, GPU), ids=str)
def test_attention_ragged(
    case: Case, place: Place, rng: np.random.Generator, benchmark: Any
) -> None:
    shape = MODELS[case.model]
    heads = (shape.n_kv_heads, shape.head_dim)
    cache = random_cache(case.cached, case.new, case.page_size, *heads, place.dtype, rng)
    offsets = row_offsets(case.new)
    q_host = random_array((sum(case.new), shape.n_heads, shape.head_dim), place.dtype, rng)
    q, kv = place.asarray(q_host), place.cache(cache)
    where = (place.asarray(offsets), kv)

    def call() -> Any:
        return ops.attention_ragged(q, *where, 0)

    got, share = call(), 0.0
    for b in some_sequences(len(case.new)):
        for i in sorted({0, case.new[b] - 1}):  # the first and the last query of the sequence
            cached = case.cached[b] + i
            row = slice(int(offsets[b]) + i, int(offsets[b]) + i + 1)
            given = (
                widen(q_host[row]),
                row_offsets([1]),
                one_sequence(cache, b, cached + 1, cached),
            )
            error, _ = attention_error(*given, 0)
            exact = reference.attention_ragged(*given, 0)
            share = max(
                share,
                assert_within_budget(to_host(got[row]), exact, place.dtype, propagated64=error),
            )

    work = _work(case, shape, cache, q_host)
    baseline = _baseline(case, place, shape, work, cache, q_host)
    measure(benchmark, place, call, work, baseline, share)


def _work(case: Case, shape: ModelShape, cache: PagedCache, q: Any) -> Work:
    """Queries in, results out, each cached token once; two products for each pair that is seen."""
    tokens = sum(case.new) + sum(case.cached)
    token = cache.blocks[:1, :, :, :1]
    pairs = sum(n * c + n * (n + 1) // 2 for n, c in zip(case.new, case.cached, strict=True))
    flops = 4 * shape.head_dim * shape.n_heads * pairs
    return Work(count_bytes(q, q) + tokens * count_bytes(token), flops)


def _baseline(
    case: Case, place: Place, shape: ModelShape, work: Work, cache: PagedCache, q: Any
) -> Baseline:
    if place.is_gpu and not work.is_bound_by_products:
        return copy_of(place, work)
    group, starts = shape.n_heads // shape.n_kv_heads, row_offsets(case.new).tolist()
    parts = []
    for b, (new, cached) in enumerate(zip(case.new, case.cached, strict=True)):
        keys, values = device_rows(cache.blocks, cache, b, 0, cached + new)
        for head in range(shape.n_kv_heads):
            queries = q[starts[b] : starts[b + 1], head * group : (head + 1) * group]
            flat = queries.transpose(1, 0, 2).reshape(-1, shape.head_dim)
            arrays = (flat, keys[:, head], values[:, head].T)
            parts.append(
                (cached, new, *(place.asarray(np.ascontiguousarray(array)) for array in arrays))
            )

    def products() -> None:
        for _, _, queries, keys, values in parts:
            ops.linear(ops.linear(queries, keys), values)

    def dense() -> None:
        for cached, new, queries, keys, values in parts:
            scores = queries @ keys.T * np.float32(shape.head_dim**-0.5)
            hidden = np.triu(np.ones((new, cached + new), bool), cached + 1)
            scores[np.tile(hidden, (group, 1))] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            p @ values.T

    return Baseline("cuBLAS", products) if place.is_gpu else Baseline("NumPy", dense)
