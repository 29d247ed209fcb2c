"""Segmented LoRA products, against a loop over the groups of two dense products (cuBLAS, NumPy)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit import ops
from lorakit.demo.weights import projections
from lorakit.reference import sgmv_expand, sgmv_lora, sgmv_shrink
from lorakit.testing import (
    MODELS,
    LoraBatch,
    assert_within_budget,
    count_bytes,
    lora_batch,
    to_host,
    widen,
)
from perf.harness import Baseline, Place, Work, cases, measure, random_array
from perf.inputs import rows_batch, some_rows


@dataclass(frozen=True)
class Case:
    """A batch on one projection of a model; all adapters have the same rank."""

    model: str
    projection: str
    tokens: int
    slots: int
    rank: int
    pattern: str

    def __str__(self) -> str:
        where = f"{self.model}-{self.projection}"
        return f"{where}-T{self.tokens}-L{self.slots}-R{self.rank}-{self.pattern}"


CPU = [
    Case("tiny", "q", 8, 4, 4, "uniform"),
    Case("tiny", "gate", 33, 3, 16, "zipf"),
    Case("tiny", "down", 16, 16, 8, "distinct"),
]
GPU = [
    Case("llama-3-8b", "q", 1, 8, 16, "distinct"),
    Case("llama-3-8b", "q", 8, 8, 16, "distinct"),
    Case("llama-3-8b", "q", 64, 64, 16, "distinct"),
    Case("llama-3-8b", "q", 64, 64, 16, "zipf"),
    Case("llama-3-8b", "q", 64, 64, 64, "distinct"),
    Case("llama-3-8b", "q", 64, 16, 16, "halfbase"),
    Case("llama-3-8b", "k", 64, 64, 16, "distinct"),
    Case("llama-3-8b", "down", 32, 32, 16, "distinct"),
    Case("llama-3-8b", "gate", 256, 16, 16, "uniform"),
    Case("llama-3-8b", "q", 256, 64, 16, "identical"),
    Case("llama-3-70b", "q", 64, 32, 16, "distinct"),
    Case("qwen2-7b", "gate", 64, 16, 64, "uniform"),
    Case("llama-3-8b", "q", 4096, 8, 16, "seg1024"),
    Case("llama-3-8b", "q", 8192, 16, 16, "seg512"),
    Case("llama-3-8b", "gate", 8192, 16, 64, "seg512"),
]


@dataclass
class Inputs:
    """On the host; `x` and `y` are the rows, `h` the rank vectors."""

    batch: LoraBatch
    x: NDArray[Any]
    h: NDArray[Any]
    y: NDArray[Any]
    a: NDArray[Any]
    b: NDArray[Any]

    @classmethod
    def of(cls, case: Case, dtype: Any, rng: np.random.Generator) -> Inputs:
        """Random ones; a delta is as large as a row of `y`."""
        in_dim, out_dim = projections(MODELS[case.model])[case.projection]
        stacked = (case.slots, case.rank)
        return cls(
            lora_batch(case.pattern, case.tokens, case.slots, rng, slot_ranks=case.rank),
            random_array((case.tokens, in_dim), dtype, rng),
            random_array((case.tokens, case.rank), np.float32, rng),
            random_array((case.tokens, out_dim), dtype, rng),
            random_array((*stacked, in_dim), dtype, rng, in_dim**-0.5),
            random_array((*stacked, out_dim), dtype, rng, case.rank**-0.5).transpose(0, 2, 1),
        )

    def b_on(self, place: Place) -> Any:
        """`b` there, rank-major underneath as layers keep it; a copy of the view would not be."""
        return place.asarray(self.b.transpose(0, 2, 1)).transpose(0, 2, 1)

    def work(self, *, shrink: bool, expand: bool) -> Work:
        """Rows that have an adapter and the adapters in use, each moved once."""
        slots, _ = self.batch.per_row()
        rows, used = slots >= 0, np.unique(slots[slots >= 0])
        moved, sides = [], 0
        if shrink:
            moved += [self.x[rows], self.a[used]]
            sides += self.x.shape[1]
        if expand:
            moved += [self.y[rows], self.y[rows], self.b[used]]
            sides += self.y.shape[1]
        if shrink != expand:
            moved += [self.h[rows]]
        return Work(count_bytes(*moved), self.batch.flops(sides, 0))


@pytest.mark.parametrize("case", cases(CPU, GPU), ids=str)
def test_sgmv_lora(case: Case, place: Place, rng: np.random.Generator, benchmark: Any) -> None:
    given = Inputs.of(case, place.dtype, rng)
    x, y, a = (place.asarray(array) for array in (given.x, given.y.copy(), given.a))
    b = given.b_on(place)
    groups = [place.asarray(array) for array in given.batch.metadata]

    def call() -> None:
        ops.sgmv_lora(x, a, b, *groups, add_to=y)

    call()
    rows = some_rows(case.tokens, rng)
    part, used = rows_batch(given.batch, rows)
    exact, terms = (
        sgmv_lora(
            sign(widen(given.x[rows])),
            sign(widen(given.a[used])),
            sign(widen(given.b[used])),
            *part.metadata,
            add_to=sign(widen(given.y[rows])),
        )
        for sign in (np.positive, np.abs)
    )
    share = assert_within_budget(
        to_host(y)[rows], exact, place.dtype, terms, length=(x.shape[1], case.rank + 1)
    )

    def loop() -> None:
        for start, stop, slot in segments(given.batch):
            ops.linear(ops.linear(x[start:stop], a[slot]), b[slot])

    measure(
        benchmark,
        place,
        call,
        given.work(shrink=True, expand=True),
        Baseline("product loop", loop),
        share,
    )


@pytest.mark.parametrize("case", cases(CPU, GPU), ids=str)
def test_sgmv_shrink(case: Case, place: Place, rng: np.random.Generator, benchmark: Any) -> None:
    given = Inputs.of(case, place.dtype, rng)
    x, a = place.asarray(given.x), place.asarray(given.a)
    groups = [place.asarray(array) for array in given.batch.metadata]
    rows = some_rows(case.tokens, rng)
    part, used = rows_batch(given.batch, rows)
    exact, terms = (
        sgmv_shrink(sign(widen(given.x[rows])), sign(widen(given.a[used])), *part.metadata)
        for sign in (np.positive, np.abs)
    )
    h = to_host(ops.sgmv_shrink(x, a, *groups))[rows]
    share = assert_within_budget(h, exact, np.float32, terms, length=x.shape[1])

    def loop() -> None:
        for start, stop, slot in segments(given.batch):
            ops.linear(x[start:stop], a[slot])

    measure(
        benchmark,
        place,
        lambda: ops.sgmv_shrink(x, a, *groups),
        given.work(shrink=True, expand=False),
        Baseline("product loop", loop),
        share,
    )


@pytest.mark.parametrize("case", cases(CPU, GPU), ids=str)
def test_sgmv_expand(case: Case, place: Place, rng: np.random.Generator, benchmark: Any) -> None:
    given = Inputs.of(case, place.dtype, rng)
    h, y, b = place.asarray(given.h), place.asarray(given.y.copy()), given.b_on(place)
    groups = [place.asarray(array) for array in given.batch.metadata]

    def call() -> None:
        ops.sgmv_expand(h, b, *groups, add_to=y)

    call()
    rows = some_rows(case.tokens, rng)
    part, used = rows_batch(given.batch, rows)
    exact, terms = (
        sgmv_expand(
            sign(widen(given.h[rows])),
            sign(widen(given.b[used])),
            *part.metadata,
            add_to=sign(widen(given.y[rows])),
        )
        for sign in (np.positive, np.abs)
    )
    share = assert_within_budget(to_host(y)[rows], exact, place.dtype, terms, length=case.rank + 1)
    narrow = h.astype(place.dtype)

    def loop() -> None:
        for start, stop, slot in segments(given.batch):
            ops.linear(narrow[start:stop], b[slot])

    measure(
        benchmark,
        place,
        call,
        given.work(shrink=False, expand=True),
        Baseline("product loop", loop),
        share,
    )


def segments(batch: LoraBatch) -> list[tuple[int, int, int]]:
    """``(first row, end, slot)`` of each group with an adapter."""
    offsets = batch.lora_grouped_offsets.tolist()
    found = zip(offsets[:-1], offsets[1:], batch.lora_ids.tolist(), strict=True)
    return [(start, stop, slot) for start, stop, slot in found if slot >= 0]
