"""Answers worked out another way than the references do: row by row, position by position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.testing import PagedCache


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """The elements as unsigned integers of the same size."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def group_of(row: int, offsets: NDArray[Any]) -> int | None:
    """The group that a row is in, None past the last one."""
    found = [g for g in range(len(offsets) - 1) if int(offsets[g]) <= row < int(offsets[g + 1])]
    return found[0] if found else None


def adapter_of_rows(
    rows: int,
    max_rank: int,
    lora_ids: NDArray[Any],
    lora_ranks: NDArray[Any] | None,
    offsets: NDArray[Any],
    slot_ranks: NDArray[Any] | None,
) -> list[tuple[int, int] | None]:
    """``(slot, effective rank)`` of each row, None for base rows."""
    found: list[tuple[int, int] | None] = []
    for row in range(rows):
        group = group_of(row, offsets)
        slot = -1 if group is None else int(lora_ids[group])
        if group is None or slot < 0:
            found.append(None)
            continue
        bounds = [max_rank]
        bounds += [] if lora_ranks is None else [int(lora_ranks[group])]
        bounds += [] if slot_ranks is None else [int(slot_ranks[slot])]
        found.append((slot, min(bounds)))
    return found


def where(cache: PagedCache, sequence: int, position: int) -> tuple[int, int]:
    """``(page, slot)`` of one position."""
    page, slot = divmod(position, cache.blocks.shape[3])
    return int(cache.lookup_table[sequence, page]), slot


def cached(
    cache: PagedCache, part: int, layer: int, sequence: int, positions: range
) -> NDArray[Any]:
    """Keys (part 0) or values (1) at some positions, ``[positions, n_kv_heads, head_dim]``."""
    out = np.zeros((len(positions), *cache.blocks.shape[4:]), cache.blocks.dtype)
    for row, position in enumerate(positions):
        page, slot = where(cache, sequence, position)
        out[row] = cache.blocks[page, part, layer, slot]
    return out


def new_places(cache: PagedCache, offsets: NDArray[Any]) -> list[tuple[int, int, int]]:
    """``(row, page, slot)`` of every token of this step."""
    places = []
    for b in range(len(offsets) - 1):
        for i in range(int(offsets[b + 1]) - int(offsets[b])):
            page, slot = where(cache, b, int(cache.cache_lengths[b]) + i)
            places.append((int(offsets[b]) + i, page, slot))
    return places


def softmax_attention(
    q: NDArray[Any],
    keys: NDArray[Any],
    values: NDArray[Any],
    visible: NDArray[np.bool_],
    scale: float,
    soft_cap: float | None = None,
    sink: float | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Output and LSE of one head; ``q [n, d]``, ``keys, values [m, d]``, ``visible [n, m]``.

    A sink is one more key, of the score that it is, with a value of 0.
    """
    out, lse = np.zeros((len(q), values.shape[1])), np.full(len(q), -np.inf)
    for i in range(len(q)):
        chosen = [j for j in range(len(keys)) if visible[i, j]]
        scores = [scale * math.fsum(q[i].astype(float) * keys[j].astype(float)) for j in chosen]
        if not scores or max(scores) == -math.inf:
            continue
        if soft_cap is not None:
            scores = [soft_cap * math.tanh(score / soft_cap) for score in scores]
        if sink is not None:
            scores.append(sink)
        weights = [math.exp(score - max(scores)) for score in scores]
        lse[i] = max(scores) + math.log(math.fsum(weights))
        for weight, j in zip(weights[: len(chosen)], chosen, strict=True):
            out[i] += weight / math.fsum(weights) * values[j].astype(float)
    return out, lse
