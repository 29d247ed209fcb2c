"""One step's results against both oracles, each within its error budget.

Attention is checked as a whole, from the layer's input to its output. The numbers it stores on the
way (q, k, v and their sums with the deltas, rotated q and k, attended heads) and all earlier keys and
values err; `MergedAttention` with errors says by how much that may move a row of the result. The last
projection, and each `LinearLoRA` of the MLP, is a sum with two stores, the base product and its sum
with the delta: `lorakit.testing.assert_within_budget` knows their budget for each element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit import reference
from lorakit.demo.block import Activations
from lorakit.demo.oracle import (
    F64,
    Merged,
    MergedAttention,
    ReferenceAttention,
    StepOnHost,
    stacked,
)
from lorakit.demo.weights import BlockWeights
from lorakit.testing import assert_within_budget, to_host, widen

# Outputs of an MLP projection that are checked in each step, drawn anew; all of a small one.
CHECKED_COLUMNS = 64


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: What was compared with what.
        share: Largest share of its budget that an element used; infinite where it failed.
        problem: The element that failed, in words; empty if all is well.
    """

    name: str
    share: float
    problem: str = ""


class Checker:
    """Runs both oracles beside the layers, step by step.

    Args:
        weights: Those the layers were loaded with.
        freqs_cis: The layer's rotary table on the host.
        num_pages, page_size: Of the cache.
        rng: Draws signs and columns.
    """

    def __init__(
        self,
        weights: BlockWeights,
        freqs_cis: NDArray[np.float32],
        num_pages: int,
        page_size: int,
        rng: np.random.Generator,
    ) -> None:
        self._weights = weights
        self._rng = rng
        self._reference = ReferenceAttention(weights, freqs_cis, num_pages, page_size)
        self._twin = MergedAttention(weights, rng)
        self._merged = self._twin.share()

    def release(self, name: str) -> None:
        """A request has left."""
        self._merged.release(name)
        self._twin.release(name)

    def step(self, step: StepOnHost, got: Activations) -> tuple[list[Check], float]:
        """Check a step.

        Returns:
            The checks, and the attention layer's error ``|got - exact| / |exact|``.
        """
        checks, error = self._attention(step, to_host(got.attention_out))
        inputs = {"gate": got.mlp_in, "up": got.mlp_in, "down": got.activated}
        for name, x in inputs.items():
            checks += self._linear(name, step, widen(to_host(x)), to_host(getattr(got, name)))
        return checks, error

    def _attention(self, step: StepOnHost, got: NDArray[Any]) -> tuple[list[Check], float]:
        exact, budget = attention_budget(self._merged, self._twin, step)
        checks = [
            within("attention, reference", got, self._reference(step), budget),
            within("attention, merged", got, exact, budget),
        ]
        norm = np.linalg.norm(exact)
        return checks, float(np.linalg.norm(widen(got) - exact) / norm)

    def _linear(self, name: str, step: StepOnHost, x: F64, got: NDArray[Any]) -> list[Check]:
        weights, out_dim = self._weights, got.shape[1]
        columns = np.sort(
            self._rng.choice(out_dim, min(out_dim, CHECKED_COLUMNS), replace=False)
        ).astype(np.intp)
        base = weights.base[name][columns].astype(np.float64)
        from_reference = reference.sgmv_lora(
            x, *stacked(weights, name, columns), *step.lora, add_to=reference.linear(x, base)
        )

        got = got[:, columns]
        exact, budget = np.empty(got.shape), Budget.empty(got.shape)
        slots = {request.slot for request in step.requests}
        merged_for = {slot: Merged.of(weights, name, slot, columns) for slot in slots}
        for i, request in enumerate(step.requests):
            rows, merged = step.rows(i), merged_for[request.slot]
            exact[rows] = x[rows] @ merged.weight.T
            budget.set(rows, merged, x[rows], exact[rows], 0.0)
        return [
            within(f"mlp {name}, reference", got, from_reference, budget),
            within(f"mlp {name}, merged", got, exact, budget),
        ]


@dataclass
class Budget:
    """What `assert_within_budget` takes for each element of a projection's result."""

    terms: F64
    largest: F64
    propagated: F64
    length: tuple[int, ...] = ()

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Budget:
        """None of any element yet."""
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(shape))

    def set(self, rows: slice, merged: Merged, x: F64, exact: F64, propagated: float | F64) -> None:
        """The budget of some rows, of which the inputs are `x`."""
        self.terms[rows] = merged.terms(x)
        self.largest[rows] = merged.largest(x, exact)
        self.propagated[rows] = propagated
        self.length = max(self.length, merged.length, key=sum)


def attention_budget(
    exact: MergedAttention, twin: MergedAttention, step: StepOnHost
) -> tuple[F64, Budget]:
    """Run a step on both; the layer's exact result ``[total_tokens, hidden_size]`` and its budget."""
    attended = exact.attended(step)
    moved = twin.attended(step) - attended
    y = np.empty_like(step.x)
    budget = Budget.empty(y.shape)
    for i, request in enumerate(step.requests):
        rows, merged = step.rows(i), exact.merged("o", request.slot)
        y[rows] = attended[rows] @ merged.weight.T
        largest_move = np.abs(moved[rows] @ merged.weight.T).max(axis=1, keepdims=True)
        budget.set(rows, merged, attended[rows], y[rows], largest_move)
    return y, budget


def within(name: str, got: NDArray[Any], exact: F64, budget: Budget) -> Check:
    """Whether every element is within its budget."""
    try:
        share = assert_within_budget(
            got,
            exact,
            got.dtype,
            budget.terms,
            stores=2,
            length=budget.length,
            largest64=budget.largest,
            propagated64=budget.propagated,
            name=name,
        )
    except AssertionError as error:
        return Check(name, float("inf"), str(error))
    return Check(name, share)
