"""Inputs on which a wrong kernel shows: outliers, mixed ranks, scattered pages, nan elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray


def widen(array: NDArray[Any]) -> NDArray[np.float64]:
    """A float64 copy. References round nothing on float64 arrays: their result is then exact."""
    return array.astype(np.float64)


def activations(shape: Sequence[int], dtype: DTypeLike, rng: np.random.Generator) -> NDArray[Any]:
    """Normal values with outliers: one in 64, at least one, is 20 times as large."""
    values = rng.standard_normal(shape)
    flat = values.reshape(-1)
    if flat.size:
        flat[rng.choice(flat.size, max(1, flat.size // 64), replace=False)] *= 20.0
    return values.astype(dtype)


@dataclass(frozen=True)
class Adapters:
    """Stacked adapters of one module."""

    lora_a: NDArray[Any]
    """``[max_num_loras, max_lora_rank, in_dim]``."""
    lora_b: NDArray[Any]
    """``[max_num_loras, out_dim, max_lora_rank]``, a view of rank-major storage."""
    slot_ranks: NDArray[np.int32]
    """``[max_num_loras]``, the true ranks."""
    bias: NDArray[Any]
    """``[max_num_loras, out_dim]``."""

    def delta_weight(self, slot: int) -> NDArray[np.float64]:
        """``B @ A`` of a slot at its true rank, ``[out_dim, in_dim]`` float64."""
        rank = int(self.slot_ranks[slot])
        delta: NDArray[np.float64] = widen(self.lora_b[slot, :, :rank]) @ widen(
            self.lora_a[slot, :rank]
        )
        return delta


def adapters(
    max_num_loras: int,
    max_lora_rank: int,
    in_dim: int,
    out_dim: int,
    dtype: DTypeLike,
    rng: np.random.Generator,
    *,
    ranks: ArrayLike | None = None,
    poison: bool = False,
) -> Adapters:
    """Adapters scaled so that their delta of normal activations has size one.

    Args:
        ranks: ``[max_num_loras]`` true ranks. None mixes: the full rank, half of it, 1, and then
            random ones.
        poison: fill what lies beyond a slot's true rank with nan, which shows in the result if it
            is read; else with zeros, as a loader does.
    """
    if ranks is None:
        mixed = [max_lora_rank, max(1, max_lora_rank // 2), 1]
        mixed += rng.integers(1, max_lora_rank, max(0, max_num_loras - 3), endpoint=True).tolist()
        ranks = mixed[:max_num_loras]
    slot_ranks = np.asarray(ranks, np.int32)
    beyond = np.arange(max_lora_rank) >= slot_ranks[:, np.newaxis]  # [slots, R]

    a = rng.standard_normal((max_num_loras, max_lora_rank, in_dim)) / np.sqrt(in_dim)
    b = rng.standard_normal((max_num_loras, max_lora_rank, out_dim))
    b /= np.sqrt(np.maximum(slot_ranks, 1))[:, np.newaxis, np.newaxis]
    a[beyond] = b[beyond] = np.nan if poison else 0.0
    bias = rng.standard_normal((max_num_loras, out_dim))
    return Adapters(
        a.astype(dtype), b.astype(dtype).transpose(0, 2, 1), slot_ranks, bias.astype(dtype)
    )


@dataclass(frozen=True)
class PagedCache:
    """A paged KV cache with the attributes that ops read from ``kv_collection``."""

    blocks: NDArray[Any]
    cache_lengths: NDArray[np.uint32]
    lookup_table: NDArray[np.uint32]
    max_lengths: NDArray[np.uint32]

    def layer(self, layer_idx: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values of a layer, views ``[num_pages, page_size, n_kv_heads, head_dim]``."""
        return self.blocks[:, 0, layer_idx], self.blocks[:, 1, layer_idx]

    def copy(self) -> PagedCache:
        """The same with blocks of its own."""
        return replace(self, blocks=self.blocks.copy())

    def widened(self) -> PagedCache:
        """The same with float64 blocks of its own."""
        return replace(self, blocks=widen(self.blocks))


def paged_cache(
    cache_lengths: Sequence[int],
    new_lengths: Sequence[int],
    *,
    page_size: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
    rng: np.random.Generator,
    num_layers: int = 1,
    layer_idx: int = 0,
    store_new: bool = True,
    other_layers: float = np.nan,
) -> PagedCache:
    """A cache of three times the pages it needs, in random order, nan wherever no token lives.

    Args:
        cache_lengths: tokens of each sequence from before this step.
        new_lengths: tokens of each sequence in this step; they have pages.
        layer_idx: the layer that gets keys and values.
        store_new: whether this step's tokens are in the cache already; else their slots are nan.
        other_layers: what all other layers hold.

    Returns:
        Normal keys and values with outliers; unused entries of ``lookup_table`` hold
        ``num_pages``, an id that no page has.
    """
    cached, new = np.asarray(cache_lengths, np.int64), np.asarray(new_lengths, np.int64)
    lengths = cached + new
    pages_of = -(-lengths // page_size)
    num_pages = 3 * int(pages_of.sum()) + 1
    order = iter(rng.permutation(num_pages))
    max_pages = int(pages_of.max(initial=0)) + 1

    blocks = np.full((num_pages, 2, num_layers, page_size, n_kv_heads, head_dim), np.nan, dtype)
    blocks[:, :, np.arange(num_layers) != layer_idx] = other_layers
    lookup_table = np.full((len(lengths), max_pages), num_pages, np.uint32)
    for b, count in enumerate(pages_of):
        lookup_table[b, :count] = [next(order) for _ in range(count)]
        for position in range(lengths[b] if store_new else cached[b]):
            page = lookup_table[b, position // page_size]
            blocks[page, :, layer_idx, position % page_size] = activations(
                (2, n_kv_heads, head_dim), dtype, rng
            )
    max_lengths = np.array([[new.max(initial=0), lengths.max(initial=0)]], np.uint32)
    return PagedCache(blocks, cached.astype(np.uint32), lookup_table, max_lengths)


def rotary_table(positions: int, rotary_dim: int, theta: float = 10000.0) -> NDArray[np.float32]:
    """``[positions, rotary_dim]`` float32: cos, sin of ``position * theta**(-2j / rotary_dim)``."""
    angles = np.outer(np.arange(positions), theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim))
    pairs = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return pairs.reshape(positions, rotary_dim).astype(np.float32)
