"""Inputs of benchmark size, and the small parts of them that are checked in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.testing import PagedCache, widen
from perf.harness import random_array


def random_cache(
    cache_lengths: Sequence[int],
    new_lengths: Sequence[int],
    page_size: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: Any,
    rng: np.random.Generator,
) -> PagedCache:
    """A cache of one layer, full of normal numbers, its pages in random order and none to spare."""
    cached = np.asarray(cache_lengths, np.int64)
    after = cached + np.asarray(new_lengths, np.int64)
    counts = -(-after // page_size)
    pages = rng.permutation(int(counts.sum())).astype(np.uint32)
    table = np.full((len(after), int(counts.max())), len(pages), np.uint32)
    for row, part in zip(table, np.split(pages, np.cumsum(counts)[:-1]), strict=True):
        row[: len(part)] = part
    blocks = random_array((len(pages), 2, 1, page_size, n_kv_heads, head_dim), dtype, rng)
    steps = np.array([[max(new_lengths), after.max()]], np.uint32)
    return PagedCache(blocks, cached.astype(np.uint32), table, steps)


def one_sequence(cache: PagedCache, sequence: int, length: int, cached: int) -> PagedCache:
    """The pages of the first `length` tokens of a sequence in a cache of their own, in float64.

    Args:
        cached: What its ``cache_lengths`` says.
    """
    page_size = cache.blocks.shape[3]
    pages = cache.lookup_table[sequence, : -(-length // page_size)]
    return PagedCache(
        widen(cache.blocks[pages]),
        np.array([cached], np.uint32),
        np.arange(len(pages), dtype=np.uint32)[np.newaxis],
        cache.max_lengths,
    )


def device_rows(
    blocks: Any, cache: PagedCache, sequence: int, start: int, stop: int
) -> NDArray[Any]:
    """Keys and values of positions ``start .. stop - 1`` on the host, ``[2, tokens, heads, dim]``.

    Args:
        blocks: Those of a cache that may be on a device.
        cache: The same cache on the host, for its lookup table.
    """
    page_size = blocks.shape[3]
    rows = []
    for page in range(start // page_size, -(-stop // page_size)):
        block = blocks[int(cache.lookup_table[sequence, page]), :, 0]
        first, last = max(start - page * page_size, 0), min(stop - page * page_size, page_size)
        rows.append((block.get() if hasattr(block, "get") else block)[:, first:last])
    return np.concatenate(rows, axis=1)


def some_sequences(batch_size: int) -> list[int]:
    """The first, the middle and the last."""
    return sorted({0, batch_size // 2, batch_size - 1})


def some_rows(total: int, rng: np.random.Generator, count: int = 8) -> NDArray[np.intp]:
    """The first row, the last, and random ones between."""
    inner = rng.choice(total, min(total, count), replace=False)
    return np.unique([0, total - 1, *inner]).astype(np.intp)


def slots_of_rows(
    mix: str, total_tokens: int, max_num_loras: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """The slot of each row of a batch, -1 for the base model.

    Args:
        mix: ``distinct`` and ``ranks`` (slots of several ranks): all slots in turn, in random order;
            ``uniform``: so many slots as the root of the rows, at random; ``zipf``: slots at random, the
            n-th as often as n**-1.5; ``identical``: one slot; ``halfbase``: distinct, every other row
            a base row; ``segN``: N long segments; ``baseN``: N segments of base rows.
    """
    turn = np.arange(total_tokens) % max_num_loras
    if mix in ("distinct", "ranks", "halfbase"):
        slots = rng.permutation(turn)
        slots[1::2] = -1 if mix == "halfbase" else slots[1::2]
    elif mix == "uniform":
        slots = rng.integers(0, min(max_num_loras, max(1, round(total_tokens**0.5))), total_tokens)
    elif mix == "zipf":
        slots = (rng.zipf(1.5, total_tokens) - 1) % max_num_loras
    elif mix == "identical":
        slots = np.full(total_tokens, max_num_loras // 2)
    elif mix.startswith("seg"):
        segments = int(mix[3:])
        slots = np.arange(total_tokens) * segments // max(total_tokens, 1) % max_num_loras
    elif mix.startswith("base"):
        slots = np.full(total_tokens, -1)
    else:
        raise ValueError(f"mix must be a pattern of rows, got {mix!r}")
    return slots.astype(np.int32)
