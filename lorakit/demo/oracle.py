"""The attention layer in float64, twice: composed of the references, and dense on merged weights.

Neither uses a layer, an op or a kernel, and the second none of lorakit's arithmetic: no pages, no
table of angles, no low-rank product. Both start from the weights on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorakit import reference
from lorakit.demo.block import THETA
from lorakit.demo.weights import BlockWeights
from lorakit.demo.workload import Request
from lorakit.dtypes import ulp
from lorakit.testing import PagedCache, attention_error, sum_factor
from lorakit.testing.budget import UNIT_ROUNDOFF

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class StepOnHost:
    """A step's input and metadata as the host knows them.

    Attributes:
        requests: The batch, in order.
        x: ``[total_tokens, hidden_size]`` float64, what the layer got.
        input_row_offsets, cache_lengths, lookup_table: As the layer got them.
        lora: ``(lora_ids, lora_ranks, lora_grouped_offsets)``.
    """

    requests: list[Request]
    x: F64
    input_row_offsets: NDArray[np.uint32]
    cache_lengths: NDArray[np.uint32]
    lookup_table: NDArray[np.uint32]
    lora: tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.uint32]]

    def rows(self, index: int) -> slice:
        """The rows of a request."""
        return slice(*(int(i) for i in self.input_row_offsets[index : index + 2]))


class ReferenceAttention:
    """The layer as a composition of `lorakit.reference`, over a paged cache of its own.

    Args:
        weights: The block's.
        freqs_cis: ``[positions, rotary_dim]`` float32, the layer's table on the host.
        num_pages, page_size: Of the manager whose lookup tables the steps come with.
    """

    def __init__(
        self,
        weights: BlockWeights,
        freqs_cis: NDArray[np.float32],
        num_pages: int,
        page_size: int,
    ) -> None:
        shape = weights.shape
        self._shape = shape
        self._table = freqs_cis
        cache = (num_pages, 2, 1, page_size, shape.n_kv_heads, shape.head_dim)
        self._blocks = np.full(cache, np.nan)
        self._base = {name: weights.base[name].astype(np.float64) for name in "qkvo"}
        self._a, self._b = {}, {}
        for name in "qkvo":
            self._a[name], self._b[name] = stacked(weights, name)

    def __call__(self, step: StepOnHost) -> F64:
        """The layer's result, ``[total_tokens, hidden_size]``; keys and values stay in the cache."""
        kv = PagedCache(
            self._blocks, step.cache_lengths, step.lookup_table, np.zeros((1, 2), np.uint32)
        )
        where = (step.input_row_offsets, kv)
        q, k, v = (
            self._project(name, step.x, step).reshape(len(step.x), -1, self._shape.head_dim)
            for name in "qkv"
        )
        reference.store_kv(k, v, *where, 0)
        q = reference.rope_ragged(q, *where, self._table, 0, interleaved=False)
        attended = reference.attention_ragged(q, *where, 0)
        return self._project("o", attended.reshape(len(q), -1), step)

    def _project(self, name: str, x: F64, step: StepOnHost) -> F64:
        y = reference.linear(x, self._base[name])
        return reference.sgmv_lora(x, self._a[name], self._b[name], *step.lora, add_to=y)


def stacked(
    weights: BlockWeights, name: str, columns: NDArray[np.intp] | None = None
) -> tuple[F64, F64]:
    """``[slots, R, in_dim]`` and ``[slots, out_dim, R]`` of a projection, scaled and zero-padded.

    Args:
        columns: Only these outputs.
    """
    slots = len(weights.adapters)
    rows = weights.base[name].shape[0] if columns is None else len(columns)
    a = np.zeros((slots, weights.max_rank, weights.base[name].shape[1]))
    b = np.zeros((slots, rows, weights.max_rank))
    for slot, adapter in enumerate(weights.adapters):
        a[slot, : adapter.rank] = adapter.a[name]
        part = adapter.b[name] if columns is None else adapter.b[name][columns]
        b[slot, :, : adapter.rank] = part.astype(np.float64) * adapter.scaling
    return a, b


@dataclass(frozen=True)
class Merged:
    """One projection for one adapter.

    Attributes:
        weight: ``W + scaling * B A``, ``[out_dim, in_dim]``.
        a, b: The factors, b scaled; None for the base model.
        size: ``[out_dim]``, so that ``size[n] * |x|`` bounds the sum of the absolute terms of an
            output, of base and delta together (Cauchy and Schwarz).
        length: Terms in the layer's sums.
    """

    weight: F64
    a: F64 | None
    b: F64 | None
    size: F64
    length: tuple[int, ...]

    @classmethod
    def of(
        cls,
        weights: BlockWeights,
        name: str,
        slot: int | None,
        columns: NDArray[np.intp] | slice = slice(None),
    ) -> Merged:
        """Merge a projection, or only some of its outputs."""
        base = weights.base[name][columns].astype(np.float64)
        size = _norms(base)
        if slot is None:
            return cls(base, None, None, size, (base.shape[1],))
        adapter = weights.adapters[slot]
        a = adapter.a[name].astype(np.float64)
        b = adapter.b[name][columns].astype(np.float64) * adapter.scaling
        size += np.abs(b) @ _norms(a)
        return cls(base + b @ a, a, b, size, (base.shape[1], base.shape[1], adapter.rank))

    def terms(self, x: F64) -> F64:
        """Bound of the sum of absolute terms of each output."""
        return np.outer(_norms(x), self.size)

    def largest(self, x: F64, y: F64) -> F64:
        """Bound of what is stored on the way: the base product, then the sum with the delta."""
        delta = 0.0 if self.a is None or self.b is None else x @ self.a.T @ self.b.T
        return np.abs(y) + np.abs(delta)


def _norms(matrix: F64) -> F64:
    """Euclidean norm of each row, without the temporaries of `numpy.linalg.norm`."""
    norms: F64 = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
    return norms


def _one_page(keys: F64, values: F64, cached: int) -> PagedCache:
    """A cache of one sequence and one page."""
    blocks = np.stack([keys, values])[np.newaxis, :, np.newaxis]
    return PagedCache(
        blocks,
        np.array([cached], np.uint32),
        np.zeros((1, 1), np.uint32),
        np.zeros((1, 2), np.uint32),
    )


@dataclass
class _History:
    keys: F64
    values: F64


@dataclass
class MergedAttention:
    """The layer on merged weights, one request at a time: dense, causal, all keys in one array.

    With `errors` it is a twin of the layer that errs: to each number that the layer stores it adds
    all that `lorakit.testing` allows there, the store's and the float32 sum's share, with a random
    sign. How far that moves the result is what the stores of a layer may add up to: the error of a
    real layer stays below, because its stores err less and no less randomly.

    Attributes:
        weights: The block's.
        errors: Draws the signs; None: exact.
    """

    weights: BlockWeights
    errors: np.random.Generator | None = None
    _merged: dict[tuple[str, int | None], Merged] = field(default_factory=dict)
    _histories: dict[str, _History] = field(default_factory=dict)

    def merged(self, name: str, slot: int | None) -> Merged:
        """A projection for an adapter."""
        key = (name, slot)
        if key not in self._merged:
            self._merged[key] = Merged.of(self.weights, name, slot)
        return self._merged[key]

    def share(self) -> MergedAttention:
        """An exact layer with the same merged weights in memory, and no requests."""
        return MergedAttention(self.weights, None, self._merged)

    def remember(self, name: str, keys: F64, values: F64) -> None:
        """Rotated keys and values of a request's earlier tokens, ``[tokens, n_kv_heads, head_dim]``."""
        self._histories[name] = _History(keys, values)

    def release(self, name: str) -> None:
        """Forget a request."""
        del self._histories[name]

    def attended(self, step: StepOnHost) -> F64:
        """What ``o_proj`` gets, ``[total_tokens, Q]``; keys and values are kept by request."""
        parts = [
            self._attended(request, step.x[step.rows(i)]) for i, request in enumerate(step.requests)
        ]
        return np.concatenate(parts)

    def _attended(self, request: Request, x: F64) -> F64:
        shape = self.weights.shape
        q, k, v = (
            self._project(name, request.slot, x).reshape(len(x), -1, shape.head_dim)
            for name in "qkv"
        )
        none = np.zeros((0, *k.shape[1:]))
        old = self._histories.get(request.name, _History(none, none))
        start = len(old.keys)
        q = self._rotated(q, start)
        keys = np.concatenate([old.keys, self._rotated(k, start)])
        values = np.concatenate([old.values, v])
        self.remember(request.name, keys, values)

        group = shape.n_heads // shape.n_kv_heads
        hidden = np.triu(np.ones((len(q), len(keys)), bool), k=start + 1)
        out = np.empty_like(q)
        for head in range(shape.n_heads):
            scores = q[:, head] @ keys[:, head // group].T / np.sqrt(shape.head_dim)
            scores[hidden] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = p @ values[:, head // group] / p.sum(axis=1, keepdims=True)
        if self.errors is not None:
            offsets = np.array([0, len(q)], np.uint32)
            own_error, _ = attention_error(q, offsets, _one_page(keys, values, start), 0)
            out = self._stored(out, np.abs(out), 1, own_error)
        return out.reshape(len(x), shape.q_dim)

    def _project(self, name: str, slot: int | None, x: F64) -> F64:
        merged = self.merged(name, slot)
        y = x @ merged.weight.T
        if self.errors is None:
            return y
        summing = sum_factor(merged.length) * UNIT_ROUNDOFF * merged.terms(x)
        return self._stored(y, merged.largest(x, y), 2, summing)

    def _rotated(self, heads: F64, start: int) -> F64:
        half = heads.shape[2] // 2
        turns = THETA ** (-np.arange(half) / half)
        turned = np.exp(1j * np.outer(np.arange(start, start + len(heads)), turns))[:, np.newaxis]
        y = (heads[..., :half] + 1j * heads[..., half:]) * turned
        re, im = np.abs(heads[..., :half]), np.abs(heads[..., half:])
        # Two products, their sum, and cos and sin rounded to float32: a sum of two terms.
        summing = np.tile(sum_factor(2) * UNIT_ROUNDOFF * (re + im), 2)
        out = np.concatenate([y.real, y.imag], axis=-1)
        return self._stored(out, np.abs(out), 1, summing)

    def _stored(self, value: F64, largest: F64, stores: int, summing: F64) -> F64:
        if self.errors is None:
            return value
        allowed = (stores + 1) * ulp(largest, self.weights.dtype) + summing
        return value + np.where(self.errors.random(value.shape) < 0.5, -allowed, allowed)
