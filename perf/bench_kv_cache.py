"""Keys and values into their pages, against a copy of the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lorakit import ops
from lorakit.testing import (
    MODELS,
    assert_bitwise_equal,
    assert_within_budget,
    count_bytes,
    row_offsets,
    widen,
)
from perf.harness import Place, Work, cases, copy_of, measure, random_array
from perf.inputs import device_rows, random_cache, some_sequences


@dataclass(frozen=True)
class Case:
    """`sequences` of `new` tokens each behind `cached` ones."""

    model: str
    sequences: int
    new: int
    cached: int
    page_size: int

    def __str__(self) -> str:
        batch = f"{self.sequences}x{self.new}-onto-{self.cached}"
        return f"{self.model}-{batch}-page{self.page_size}"


CPU = [Case("tiny", 3, 1, 20, 16), Case("tiny", 2, 17, 5, 3)]
GPU = [
    Case("llama-3-8b", 64, 1, 1024, 16),
    Case("llama-3-8b", 256, 1, 1024, 16),
    Case("llama-3-8b", 8, 1024, 0, 16),
    Case("llama-3-8b", 8, 1024, 0, 128),
    Case("llama-3-8b", 16, 4096, 0, 16),
]


@pytest.mark.parametrize("case", cases(CPU, GPU), ids=str)
@pytest.mark.parametrize("op", [ops.store_kv, ops.add_kv], ids=["store_kv", "add_kv"])
def test_write_kv(
    op: Any, case: Case, place: Place, rng: np.random.Generator, benchmark: Any
) -> None:
    shape = MODELS[case.model]
    new, cached = [case.new] * case.sequences, [case.cached] * case.sequences
    heads = (shape.n_kv_heads, shape.head_dim)
    cache = random_cache(cached, new, case.page_size, *heads, place.dtype, rng)
    before, offsets = cache.copy(), row_offsets(new)
    given = random_array((2, sum(new), *heads), place.dtype, rng)
    kv, k, v = place.cache(cache), place.asarray(given[0]), place.asarray(given[1])
    where = (place.asarray(offsets), kv)

    def call() -> None:
        op(k, v, *where, 0)

    call()
    share, adds = 0.0, op is ops.add_kv
    for b in some_sequences(case.sequences):
        tokens = (b, case.cached, case.cached + case.new)
        got = device_rows(kv.blocks, cache, *tokens)
        wanted = given[:, offsets[b] : offsets[b + 1]]
        if adds:
            exact = widen(device_rows(before.blocks, before, *tokens)) + widen(wanted)
            share = max(share, assert_within_budget(got, exact, place.dtype))
        else:
            assert_bitwise_equal(got, wanted)

    # Each element is read and written; where it is added, the cache is read too.
    work = Work(count_bytes(given, given, *([given] if adds else [])))
    measure(benchmark, place, call, work, copy_of(place, work), share)
