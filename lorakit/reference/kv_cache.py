"""References of the writes into the paged KV cache, and how a position is found in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class KVCache(Protocol):
    """The arrays of a paged cache that an op reads; any object that has them will do.

    ``lookup_table[sequence, position // page_size] -> page`` and ``cache_lengths[sequence]`` ->
    tokens cached before this step. Slots that hold no token may hold anything.
    """

    @property
    def cache_lengths(self) -> NDArray[Any]:
        """``[batch_size]`` uint32 or int32."""

    @property
    def lookup_table(self) -> NDArray[Any]:
        """``[batch_size, max_pages]`` uint32 or int32."""

    def layer(self, layer_idx: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values, views ``[num_pages, page_size, n_kv_heads, head_dim]``, written in place."""


def places(
    kv_collection: KVCache, page_size: int, sequence: int, start: int, stop: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """``(pages, slots)`` of positions ``start .. stop - 1`` of a sequence.

    ``keys[pages, slots]`` are then the keys, ``[stop - start, n_kv_heads, head_dim]``.
    """
    positions = np.arange(start, stop)
    return kv_collection.lookup_table[sequence, positions // page_size], positions % page_size


def new_tokens(
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    page_size: int,
    *,
    batch_offset: int = 0,
) -> Iterator[tuple[slice, NDArray[Any], NDArray[Any]]]:
    """``(rows, pages, slots)`` of this step's tokens, one item for each sequence."""
    for i in range(len(input_row_offsets) - 1):
        start, stop = int(input_row_offsets[i]), int(input_row_offsets[i + 1])
        cached = int(kv_collection.cache_lengths[i + batch_offset])
        yield (
            slice(start, stop),
            *places(kv_collection, page_size, i + batch_offset, cached, cached + stop - start),
        )


def store_kv(
    k: NDArray[Any],
    v: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    layer_idx: int,
) -> None:
    """Copies this step's keys and values into the cache, bit for bit.

    Row ``t`` of sequence ``b`` goes to position ``cache_lengths[b] + t - input_row_offsets[b]``.

    Args:
        k, v: ``[total_tokens, n_kv_heads, head_dim]``, the cache's dtype.
        input_row_offsets: ``[batch_size + 1]``.
        kv_collection: see :class:`KVCache`; its layer is written.
        layer_idx: layer of the cache.
    """
    keys, values = kv_collection.layer(layer_idx)
    for rows, pages, slots in new_tokens(input_row_offsets, kv_collection, keys.shape[1]):
        keys[pages, slots] = k[rows]
        values[pages, slots] = v[rows]


def add_kv(
    k: NDArray[Any],
    v: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    layer_idx: int,
    *,
    batch_offset: int = 0,
) -> None:
    """Adds to the keys and values of this step in the cache: ``cache = round(cache + k)``.

    The sum is one float32 addition. MAX: ``kv_cache_ragged_radd``, whose one argument is
    ``[k | v]``.

    Args:
        k, v: ``[total_tokens, n_kv_heads, head_dim]``, the cache's dtype or float32. Row ``i`` is
            token ``i + input_row_offsets[0]`` of the batch.
        input_row_offsets: ``[sequences + 1]``, all offsets of the batch or a tail of them.
        kv_collection: see :class:`KVCache`; its layer is added to.
        layer_idx: layer of the cache.
        batch_offset: sequence of the cache that the first offset belongs to.
    """
    layer = kv_collection.layer(layer_idx)
    wide = np.promote_types(layer[0].dtype, np.float32)
    first = int(input_row_offsets[0])
    for rows, pages, slots in new_tokens(
        input_row_offsets, kv_collection, layer[0].shape[1], batch_offset=batch_offset
    ):
        for part, delta in zip(layer, (k, v), strict=True):
            added = delta[rows.start - first : rows.stop - first].astype(wide)
            part[pages, slots] = (part[pages, slots].astype(wide) + added).astype(part.dtype)
