"""Ragged batches: offsets, and which rows use which adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def row_offsets(lengths: ArrayLike) -> NDArray[np.uint32]:
    """``[len(lengths) + 1]`` uint32 offsets of consecutive runs of rows: 0 and the running sums."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.uint32)


@dataclass(frozen=True)
class LoraBatch:
    """Groups of consecutive rows that share an adapter, as the sgmv ops take them."""

    lora_ids: NDArray[np.int32]
    lora_ranks: NDArray[np.uint32]
    lora_grouped_offsets: NDArray[np.uint32]

    @property
    def metadata(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """``(lora_ids, lora_ranks, lora_grouped_offsets)``, in the order of an op's arguments."""
        return self.lora_ids, self.lora_ranks, self.lora_grouped_offsets

    @property
    def total_tokens(self) -> int:
        """Rows that the groups cover."""
        return int(self.lora_grouped_offsets[-1])

    def per_row(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """``(slot, rank)`` of each row; slot is negative and rank 0 in base rows."""
        lengths = np.diff(self.lora_grouped_offsets)
        ranks = np.where(self.lora_ids < 0, 0, self.lora_ranks.astype(np.int64))
        return np.repeat(self.lora_ids, lengths), np.repeat(ranks, lengths)

    def flops(self, in_dim: int, out_dim: int) -> int:
        """Floating-point operations of shrink and expand at the batch's true ranks."""
        return int(2 * self.per_row()[1].sum() * (in_dim + out_dim))


def lora_batch(
    pattern: str,
    total_tokens: int,
    num_adapters: int,
    rng: np.random.Generator,
    *,
    slot_ranks: ArrayLike = 16,
) -> LoraBatch:
    """A batch of ``total_tokens`` rows over ``num_adapters`` adapters; slots are in random order.

    Args:
        pattern: how popular the adapters are.

            ========== ==========================================================================
            identical  all rows on one adapter: one group
            distinct   one row per group, neighbours differ (every row its own adapter as long as
                       there are enough)
            uniform    one group per adapter, equal sizes
            zipf       one group per adapter, sizes in the proportions 1, 1/2, 1/3, ...
            skewed     one group per adapter, each 1.5 times as large as the next (Punica)
            halfbase   uniform, but each adapter's group is cut in half and the second half is base
            segN       groups of N rows, ``seg8`` for example, the adapters in turn; the last group
                       has what remains
            ========== ==========================================================================
        total_tokens: rows, >= 0.
        num_adapters: slots to choose from, >= 1.
        slot_ranks: ``[num_adapters]`` or one number: what ``lora_ranks`` says of each slot.

    Raises:
        ValueError: the pattern is unknown.
    """
    slots = rng.permutation(num_adapters)
    if pattern == "identical":
        lengths = [total_tokens]
    elif pattern == "distinct":
        lengths = [1] * total_tokens
    elif pattern == "zipf":
        lengths = _shares(total_tokens, 1.0 / np.arange(1, num_adapters + 1))
    elif pattern == "skewed":
        lengths = _shares(total_tokens, 1.5 ** -np.arange(num_adapters, dtype=np.float64))
    elif pattern in ("uniform", "halfbase"):
        lengths = _shares(total_tokens, np.ones(num_adapters))
    elif pattern.startswith("seg") and pattern[3:].isdecimal() and int(pattern[3:]) > 0:
        whole, rest = divmod(total_tokens, int(pattern[3:]))
        lengths = [int(pattern[3:])] * whole + [rest]
    else:
        raise ValueError(
            "pattern: wanted identical, distinct, uniform, zipf, skewed, halfbase or segN, "
            f"got {pattern!r}"
        )
    lengths = [length for length in lengths if length > 0]
    groups = list(zip(np.resize(slots, len(lengths)).tolist(), lengths, strict=True))
    if pattern == "halfbase":
        halves = [((slot, math.ceil(n / 2)), (-1, n // 2)) for slot, n in groups]
        groups = [group for pair in halves for group in pair if group[1] > 0]
    ids = np.array([slot for slot, _ in groups], np.int32)
    ranks = np.where(ids < 0, 0, np.resize(np.asarray(slot_ranks), num_adapters)[ids])
    return LoraBatch(ids, ranks.astype(np.uint32), row_offsets([n for _, n in groups]))


def _shares(total: int, weights: NDArray[np.float64]) -> list[int]:
    """``total`` cut into whole parts as close to the proportions of ``weights`` as can be."""
    ends = np.rint(np.cumsum(weights) / weights.sum() * total).astype(int)
    return [int(n) for n in np.diff(ends, prepend=0)]
