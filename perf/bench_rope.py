"""Rotation of queries and cached keys, against a copy (GPU) or plain NumPy on dense arrays (CPU).

Together with storing keys and values, against the two ops apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lorakit import ops, reference
from lorakit.testing import (
    MODELS,
    assert_bitwise_equal,
    assert_within_budget,
    count_bytes,
    rope_terms,
    rotary_table,
    row_offsets,
    to_host,
    widen,
)
from perf.harness import Baseline, Place, Work, cases, copy_of, measure, random_array
from perf.inputs import device_rows, one_sequence, random_cache, some_sequences


@dataclass(frozen=True)
class Case:
    """`sequences` of `new` tokens each behind `cached` ones."""

    model: str
    sequences: int
    new: int
    cached: int
    interleaved: bool
    page_size: int = 16

    def __str__(self) -> str:
        layout = "interleaved" if self.interleaved else "halves"
        return f"{self.model}-{self.sequences}x{self.new}-onto-{self.cached}-{layout}"


CPU = [Case("tiny", 3, 1, 20, True), Case("tiny", 2, 17, 5, False)]
GPU = [
    Case("llama-3-8b", 64, 1, 1024, False),
    Case("llama-3-8b", 256, 1, 1024, False),
    Case("llama-3-70b", 64, 1, 1024, False),
    Case("llama-3-8b", 64, 4, 4096, False),
    Case("llama-3-8b", 8, 1024, 0, False),
    Case("llama-3-8b", 8, 1024, 0, True),
    Case("qwen2-7b", 8, 1024, 0, False),
    Case("llama-3-8b", 16, 2048, 0, False),
]
STORE_GPU = [
    Case("llama-3-8b", 64, 1, 1024, False),
    Case("llama-3-8b", 64, 1, 1024, True),
    Case("llama-3-70b", 64, 1, 1024, False),
    Case("llama-3-8b", 512, 1, 1024, False),
    Case("llama-3-8b", 1, 1024, 0, False),
    Case("llama-3-8b", 8, 1024, 0, False),
    Case("llama-3-8b", 8, 1024, 0, True),
    Case("llama-3-8b", 16, 4096, 0, False),
]


@pytest.mark.parametrize("case", cases(CPU, GPU), ids=str)
def test_rope_ragged(case: Case, place: Place, rng: np.random.Generator, benchmark: Any) -> None:
    shape = MODELS[case.model]
    new, cached = [case.new] * case.sequences, [case.cached] * case.sequences
    heads = (shape.n_kv_heads, shape.head_dim)
    cache = random_cache(cached, new, case.page_size, *heads, place.dtype, rng)
    offsets = row_offsets(new)
    q_host = random_array((sum(new), shape.n_heads, shape.head_dim), place.dtype, rng)
    table_host = rotary_table(case.cached + case.new, shape.head_dim)
    before = cache.copy()
    kv, q, table = place.cache(cache), place.asarray(q_host), place.asarray(table_host)
    where = (place.asarray(offsets), kv)

    def call() -> Any:
        return ops.rope_ragged(q, *where, table, 0, interleaved=case.interleaved)

    got, share = call(), 0.0
    for b in some_sequences(case.sequences):
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        small = one_sequence(before, b, case.cached + case.new, case.cached)
        given = (widen(q_host[rows]), row_offsets([case.new]))
        q_terms, k_terms = rope_terms(*given, small, table_host, 0, interleaved=case.interleaved)
        exact = reference.rope_ragged(*given, small, table_host, 0, interleaved=case.interleaved)
        share = max(
            share,
            assert_within_budget(to_host(got[rows]), exact, place.dtype, q_terms, length=2),
        )
        here = (b, case.cached, case.cached + case.new)
        tokens = (0, case.cached, case.cached + case.new)
        share = max(
            share,
            assert_within_budget(
                device_rows(kv.blocks, cache, *here)[0],
                device_rows(small.blocks, small, *tokens)[0],
                place.dtype,
                device_rows(k_terms, small, *tokens)[0],
                length=2,
                name="keys",
            ),
        )

    # Queries and keys are read and written, a row of the table for each position is read.
    keys = random_array((sum(new), *heads), place.dtype, rng)
    positions = table_host[case.cached :]
    work = Work(count_bytes(q_host, q_host, keys, keys, positions))
    measure(benchmark, place, call, work, _baseline(case, place, work, q_host, keys), share)


@pytest.mark.parametrize("case", cases(CPU, STORE_GPU), ids=str)
def test_rope_store_kv(case: Case, place: Place, rng: np.random.Generator, benchmark: Any) -> None:
    """Queries, keys and values are slices of one fused projection."""
    shape = MODELS[case.model]
    new, cached = [case.new] * case.sequences, [case.cached] * case.sequences
    heads = (shape.n_kv_heads, shape.head_dim)
    cache = random_cache(cached, new, case.page_size, *heads, place.dtype, rng)
    offsets, end = row_offsets(new), case.cached + case.new
    fused = random_array((sum(new), shape.n_heads + 2 * heads[0], heads[1]), place.dtype, rng)
    ends = (shape.n_heads, shape.n_heads + heads[0])
    table_host = rotary_table(end, shape.head_dim)
    before = cache.copy()
    kv, table = place.cache(cache), place.asarray(table_host)
    on_device = place.asarray(fused)
    q, k, v = on_device[:, : ends[0]], on_device[:, ends[0] : ends[1]], on_device[:, ends[1] :]
    where = (place.asarray(offsets), kv)

    def call() -> Any:
        return ops.rope_store_kv(q, k, v, *where, table, 0, interleaved=case.interleaved)

    def apart() -> Any:
        ops.store_kv(k, v, *where, 0)
        return ops.rope_ragged(q, *where, table, 0, interleaved=case.interleaved)

    got, share = call(), 0.0
    for b in some_sequences(case.sequences):
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        q_host, k_host, v_host = np.split(fused[rows], ends, axis=1)
        small = one_sequence(before, b, end, case.cached)
        one = row_offsets([case.new])
        reference.store_kv(widen(k_host), widen(v_host), one, small, 0)
        given = (widen(q_host), one)
        q_terms, k_terms = rope_terms(*given, small, table_host, 0, interleaved=case.interleaved)
        exact = reference.rope_ragged(*given, small, table_host, 0, interleaved=case.interleaved)
        wanted, terms = (
            device_rows(blocks, small, 0, case.cached, end)[0] for blocks in (small.blocks, k_terms)
        )
        keys, values = device_rows(kv.blocks, cache, b, case.cached, end)
        for result, right, size in ((to_host(got[rows]), exact, q_terms), (keys, wanted, terms)):
            share = max(share, assert_within_budget(result, right, place.dtype, size, length=2))
        assert_bitwise_equal(values, v_host)

    # Everything is read and written, a row of the table for each position is read.
    work = Work(count_bytes(fused, fused, table_host[case.cached :]))
    measure(benchmark, place, call, work, Baseline("apart", apart), share)


def _baseline(case: Case, place: Place, work: Work, q: Any, k: Any) -> Baseline:
    if place.is_gpu:
        return copy_of(place, work)
    positions = case.cached + np.tile(np.arange(case.new), case.sequences)
    angles = np.outer(positions, 10000.0 ** (-np.arange(0, q.shape[2], 2) / q.shape[2]))
    turns = np.exp(1j * angles).astype(np.complex64)[:, np.newaxis]

    def rotate() -> None:
        for heads in (q, k):
            if case.interleaved:
                (heads.view(np.complex64) * turns).view(np.float32)
            else:
                re, im = np.split(heads, 2, axis=2)
                np.concatenate(
                    [re * turns.real - im * turns.imag, re * turns.imag + im * turns.real], axis=2
                )

    return Baseline("NumPy", rotate)
