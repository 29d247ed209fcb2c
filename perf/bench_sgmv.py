"""Segmented LoRA products: all slices of an input, weights in turn, against the base product and peers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit import ops
from lorakit.demo.weights import projections
from lorakit.reference import sgmv_lora_slices
from lorakit.testing import MODELS, assert_within_budget, to_host, widen
from perf import peers
from perf.harness import Baseline, Place, Work, cases, measure_in_turn
from perf.inputs import slots_of_rows, some_rows

INPUTS = {"qkv": ("q", "k", "v"), "q": ("q",), "gate_up": ("gate", "up"), "down": ("down",)}
COLD_BYTES = 300e6  # five times the L2 cache of an H200
LEAST_CALLS = 16


@dataclass(frozen=True)
class Case:
    """A batch on the projections of one input of a model, and how its rows use the adapters."""

    model: str
    input: str
    tokens: int
    slots: int
    rank: int
    mix: str

    def __str__(self) -> str:
        where = f"{self.model}-{self.input}"
        return f"{where}-T{self.tokens}-L{self.slots}-R{self.rank}-{self.mix}"


CPU = [
    Case("tiny", "qkv", 8, 4, 4, "uniform"),
    Case("tiny", "gate_up", 33, 3, 16, "zipf"),
    Case("tiny", "down", 16, 16, 8, "distinct"),
    Case("tiny", "q", 16, 4, 8, "ranks"),
    Case("tiny", "qkv", 8, 4, 4, "base2"),
]
_8B, _70B = "llama-3-8b", "llama-3-70b"
GPU = [
    Case(_8B, "qkv", 1, 8, 16, "distinct"),
    Case(_8B, "qkv", 8, 8, 16, "distinct"),
    Case(_8B, "qkv", 64, 64, 16, "distinct"),
    Case(_8B, "qkv", 64, 64, 16, "zipf"),
    Case(_8B, "qkv", 64, 64, 64, "distinct"),
    Case(_8B, "qkv", 256, 64, 16, "identical"),
    Case(_8B, "gate_up", 256, 64, 16, "uniform"),
    Case(_8B, "down", 32, 64, 16, "distinct"),
    Case(_8B, "qkv", 4096, 8, 16, "seg4"),
    Case(_8B, "q", 8192, 16, 16, "seg16"),
    Case(_8B, "gate_up", 8192, 16, 16, "seg16"),
    Case(_8B, "gate_up", 8192, 16, 128, "seg16"),
    # Ranks.
    *(Case(_8B, "qkv", 64, 64, rank, "distinct") for rank in (8, 32, 128, 256)),
    *(Case(_8B, "gate_up", 8192, 16, rank, "seg16") for rank in (8, 32, 64, 256)),
    Case(_8B, "qkv", 32, 32, 64, "distinct"),
    Case(_8B, "qkv", 256, 64, 64, "distinct"),
    # Mixes.
    Case(_8B, "qkv", 16, 64, 16, "distinct"),
    Case(_8B, "qkv", 64, 64, 16, "uniform"),
    Case(_8B, "qkv", 64, 64, 16, "halfbase"),
    Case(_8B, "qkv", 64, 64, 64, "ranks"),
    Case(_8B, "qkv", 128, 64, 16, "zipf"),
    Case(_8B, "qkv", 512, 64, 16, "uniform"),
    Case(_8B, "gate_up", 64, 64, 16, "distinct"),
    Case(_8B, "gate_up", 1, 8, 16, "distinct"),
    Case(_8B, "down", 1, 8, 16, "distinct"),
    Case(_8B, "down", 256, 64, 16, "zipf"),
    Case(_8B, "qkv", 1024, 8, 16, "seg2"),
    Case(_8B, "qkv", 2048, 64, 16, "seg64"),
    Case(_8B, "down", 4096, 8, 16, "seg4"),
    # No adapter at all.
    Case(_8B, "qkv", 1, 64, 16, "base1"),
    Case(_8B, "qkv", 64, 64, 16, "base1"),
    Case(_8B, "qkv", 64, 64, 16, "base64"),
    Case(_8B, "qkv", 4096, 64, 16, "base4"),
    Case(_8B, "gate_up", 8192, 64, 16, "base16"),
    # A larger model.
    Case(_70B, "qkv", 1, 8, 16, "distinct"),
    Case(_70B, "qkv", 64, 64, 16, "distinct"),
    Case(_70B, "gate_up", 64, 64, 16, "uniform"),
    Case(_70B, "down", 32, 32, 16, "distinct"),
    Case(_70B, "qkv", 4096, 8, 16, "seg4"),
    Case(_70B, "gate_up", 4096, 8, 16, "seg4"),
    Case(_70B, "qkv", 64, 64, 64, "distinct"),
    Case(_70B, "gate_up", 4096, 8, 64, "seg4"),
    Case(_70B, "down", 4096, 8, 32, "seg4"),
]


class Inputs:
    """A case on its device; the weights several times, so that a graph of calls finds them cold."""

    def __init__(self, case: Case, place: Place, rng: np.random.Generator) -> None:
        shape = projections(MODELS[case.model])
        self.place = place
        sizes = [shape[name] for name in INPUTS[case.input]]
        self.in_dim, self.out_dims = sizes[0][0], [out_dim for _, out_dim in sizes]
        self.slots = slots_of_rows(case.mix, case.tokens, case.slots, rng)
        self.ranks = np.full(case.slots, case.rank, np.int32)
        if case.mix == "ranks":
            self.ranks = np.resize(case.rank // np.array([8, 1, 4, 2]), case.slots).astype(np.int32)
        firsts = np.append(0, np.flatnonzero(np.diff(self.slots)) + 1)
        if case.mix.startswith("base"):
            firsts = np.arange(0, case.tokens, case.tokens // int(case.mix[4:]))
        self.metadata = (
            place.asarray(self.slots[firsts]),
            None,
            place.asarray(np.append(firsts, case.tokens).astype(np.int32)),
        )
        self.slot_ranks = [place.asarray(self.ranks)] * len(sizes)
        self.x = place.random((case.tokens, self.in_dim), rng)
        y_bytes = 4 * case.tokens * sum(self.out_dims) if case.tokens > 1000 else 0
        copies = int(np.clip(COLD_BYTES // max(self.work.bytes + y_bytes, 1) + 1, 2, 48))
        self.weights = [
            (
                [
                    place.random((case.slots, case.rank, self.in_dim), rng, self.in_dim**-0.5)
                    for _ in sizes
                ],
                [
                    # Rank-major underneath, as layers keep it.
                    place.random((case.slots, case.rank, out_dim), rng, case.rank**-0.5).transpose(
                        0, 2, 1
                    )
                    for out_dim in self.out_dims
                ],
                [place.random((case.tokens, out_dim), rng) for out_dim in self.out_dims],
            )
            for _ in range(copies if place.is_gpu else 1)
        ]

    @property
    def work(self) -> Work:
        """Rows that have an adapter and the adapters in use, each moved once, at their ranks."""
        live = self.slots[self.slots >= 0]
        ranks = int(self.ranks[np.unique(live)].sum())
        sides = len(self.out_dims) * self.in_dim + sum(self.out_dims)
        elements = len(live) * (self.in_dim + 2 * sum(self.out_dims)) + ranks * sides
        flops = 2 * int(self.ranks[live].sum()) * sides
        return Work(elements * self.x.dtype.itemsize, flops)

    def call(self, which: int, route: ops.LoRARoute) -> None:
        a, b, y = self.weights[which]
        ops.sgmv_lora_slices(
            self.x, a, b, *self.metadata, slot_ranks=self.slot_ranks, add_to=y, route=route
        )

    def route(self) -> ops.LoRARoute:
        return ops.sgmv_route(self.x, *self.metadata, max_num_loras=len(self.ranks))

    def alone(self, rows: NDArray[np.intp], before: list[Any]) -> list[Any]:
        """The results of some rows in a batch of their own, a group each."""
        slots = self.place.asarray(self.slots[rows].astype(np.int32))
        offsets = self.place.asarray(np.arange(len(rows) + 1, dtype=np.int32))
        x = self.place.asarray(np.ascontiguousarray(to_host(self.x)[rows]))
        y = [self.place.asarray(part[rows].copy()) for part in before]
        a, b, _ = self.weights[0]
        ops.sgmv_lora_slices(x, a, b, slots, None, offsets, slot_ranks=self.slot_ranks, add_to=y)
        return [to_host(part) for part in y]

    def exact(self, rows: NDArray[np.intp], before: list[Any]) -> tuple[list[Any], list[Any]]:
        """Of some rows, in float64: the results, and the sums of absolute terms."""
        slots, (a, b, _) = self.slots[rows], self.weights[0]
        used = np.unique(slots[slots >= 0])
        ids = np.where(slots < 0, -1, np.searchsorted(used, slots)).astype(np.int32)
        offsets = np.arange(len(rows) + 1, dtype=np.int32)
        x = to_host(self.x)[rows]

        def of(sign: Any) -> list[Any]:
            return list(
                sgmv_lora_slices(
                    sign(widen(x)),
                    [sign(widen(to_host(part[used]))) for part in a],
                    [sign(widen(to_host(part[used]))) for part in b],
                    ids,
                    None,
                    offsets,
                    slot_ranks=[self.ranks[used]] * len(a),
                    add_to=[sign(widen(part[rows])) for part in before],
                )
            )

        return of(np.positive), of(np.abs)


@pytest.mark.parametrize("case", cases(CPU, GPU), ids=str)
def test_sgmv_lora(case: Case, place: Place, rng: np.random.Generator, benchmark: Any) -> None:
    given = Inputs(case, place, rng)
    route = given.route()
    before = [to_host(y).copy() for y in given.weights[0][2]]
    given.call(0, route)
    rows = some_rows(case.tokens, rng)
    results = [to_host(y)[rows] for y in given.weights[0][2]]
    exact, terms = given.exact(rows, before)
    share = max(
        assert_within_budget(y, *expected, length=(given.in_dim, case.rank + 1))
        for y, *expected in zip(results, exact, [place.dtype] * len(exact), terms, strict=True)
    )
    same = all(map(np.array_equal, map(_bits, results), map(_bits, given.alone(rows, before))))

    count = max(LEAST_CALLS, len(given.weights)) if place.is_gpu else 1
    order = list(itertools.islice(itertools.cycle(range(len(given.weights))), count))
    base = [place.random((out_dim, given.in_dim), rng) for out_dim in given.out_dims]

    def base_product() -> None:
        for weight in base:
            ops.linear(given.x, weight)

    found = {}
    if place.is_gpu and given.work.bytes:
        lora_a, lora_b, _ = zip(*given.weights, strict=True)
        found = peers.times(given.x, lora_a, lora_b, count, given.slots, given.ranks)
    measure_in_turn(
        benchmark,
        place,
        [partial(given.call, i, route) for i in order],
        given.work,
        Baseline("base product", base_product),
        share,
        {
            **{f"{name} us": f"{seconds * 1e6:.2f}" for name, seconds in found.items()},
            "error": _error_ratio(results, exact, place.dtype),
            "same bits": "yes" if same else "NO",
        },
    )


@pytest.mark.parametrize("case", cases(CPU, GPU[:12]), ids=str)
def test_sgmv_route(case: Case, place: Place, rng: np.random.Generator, benchmark: Any) -> None:
    given = Inputs(case, place, rng)
    metadata = [array for array in given.metadata if array is not None]
    moved = sum(int(array.nbytes) for array in metadata) + 4 * case.tokens
    of_rows = place.asarray(given.slots)
    measure_in_turn(
        benchmark,
        place,
        [given.route] * (LEAST_CALLS if place.is_gpu else 1),
        Work(moved),
        Baseline("argsort of slots", of_rows.argsort),
        0.0,
        {},
    )


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(f"u{array.dtype.itemsize}")


def _error_ratio(results: list[Any], exact: list[Any], dtype: Any) -> str:
    """Norm of the error, over that of rounding the exact result once, if that is not exact."""
    error = sum(((widen(y) - e) ** 2).sum() for y, e in zip(results, exact, strict=True))
    least = sum(((widen(e.astype(dtype)) - e) ** 2).sum() for e in exact)
    return f"{(error / least) ** 0.5:.4f}" if least else "-"
