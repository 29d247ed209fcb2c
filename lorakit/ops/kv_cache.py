"""Keys and values into the paged cache: store and add."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorakit import checks, jit, reference, tiles
from lorakit.ops._metadata import check_cache, signed, unsigned


def store_kv(k: Any, v: Any, input_row_offsets: Any, kv_collection: Any, layer_idx: int) -> None:
    """Write the keys and values of this step into their pages, in place.

    For token ``t`` of sequence ``b``, at ``p = cache_lengths[b] + t - input_row_offsets[b]``::

        keys[lookup_table[b, p // page_size], p % page_size] = k[t]
        values[lookup_table[b, p // page_size], p % page_size] = v[t]

    Args:
        k: ``[total_tokens, n_kv_heads, head_dim]`` in the cache's dtype; rows may lie apart.
        v: Like `k`.
        input_row_offsets: ``[batch_size + 1]`` uint32 or int32.
        kv_collection: The paged cache, a `lorakit.PagedKVCacheCollection` or
            `lorakit.PagedKVCacheLayers`; above, the keys and values of its layer `layer_idx`.
        layer_idx: The layer of the cache.

    Raises:
        ValueError, TypeError: Naming the argument; nothing was written.
    """
    sizes = _check(k, v, input_row_offsets, kv_collection, layer_idx, 0)
    backend = jit.backend_of(k)
    if sizes["total_tokens"] == 0:
        return
    if backend is None:
        reference.store_kv(k, v, input_row_offsets, kv_collection, layer_idx)
        return

    tile = tiles.store_kv(k.dtype)
    _launch(backend, tile, k, v, input_row_offsets, kv_collection, layer_idx, 0)


def add_kv(
    k: Any,
    v: Any,
    input_row_offsets: Any,
    kv_collection: Any,
    layer_idx: int,
    *,
    batch_offset: int = 0,
) -> None:
    """Add to the keys and values at the positions of this step, in place (MAX ``kv_cache_ragged_radd``).

    As `store_kv` with ``+=``; added in float32 and rounded once.

    Args:
        k: ``[total_tokens, n_kv_heads, head_dim]`` in the cache's dtype or float32; rows may lie apart.
        v: Like `k`.
        input_row_offsets: ``[batch_size + 1]`` uint32 or int32, or the offsets of the last sequences of
            the batch only: then row ``i`` is token ``i + input_row_offsets[0]``.
        kv_collection: The paged cache, as in `store_kv`.
        layer_idx: The layer of the cache.
        batch_offset: The cache's sequence that the first sequence of `input_row_offsets` is.

    Raises:
        ValueError, TypeError: Naming the argument; nothing was written.
    """
    wider = (np.dtype(np.float32),)
    sizes = _check(k, v, input_row_offsets, kv_collection, layer_idx, batch_offset, wider)
    checks.check_dtype((k.dtype,), v=v)
    backend = jit.backend_of(k)
    if sizes["total_tokens"] == 0:
        return
    if backend is None:
        reference.add_kv(
            k, v, input_row_offsets, kv_collection, layer_idx, batch_offset=batch_offset
        )
        return

    keys, _ = kv_collection.layer(layer_idx)
    tile = tiles.add_kv(keys.dtype, k.dtype)
    _launch(backend, tile, k, v, input_row_offsets, kv_collection, layer_idx, batch_offset)


def cache_arguments(
    backend: jit.Backend, kv_collection: Any, layer_idx: int, batch_offset: int = 0
) -> list[Any]:
    """The four arrays of a layer of the cache as every kernel takes them."""
    return [
        *kv_collection.layer(layer_idx),
        unsigned(backend, kv_collection.lookup_table)[batch_offset:],
        unsigned(backend, kv_collection.cache_lengths)[batch_offset:],
    ]


def cache_sizes(kv_collection: Any, layer_idx: int) -> list[Any]:
    """Sizes, and strides in elements, of a layer of the cache as every kernel takes them, last."""
    keys, values = kv_collection.layer(layer_idx)
    num_pages, page_size, n_kv_heads, head_dim = keys.shape
    max_pages = kv_collection.lookup_table.shape[1]
    strides = [
        np.int64(stride // keys.dtype.itemsize)
        for array in (keys, values)
        for stride in array.strides[:3]
    ]
    return [num_pages, max_pages, page_size, *strides, n_kv_heads, head_dim]


def _check(
    k: Any,
    v: Any,
    input_row_offsets: Any,
    kv_collection: Any,
    layer_idx: int,
    batch_offset: int,
    wider: tuple[Any, ...] = (),
) -> dict[str, int]:
    """Of k and v in the cache's dtype, or in one of `wider`."""
    axes = "total_tokens n_kv_heads head_dim"
    rows = k.shape[0] if getattr(k, "shape", None) else 0
    sizes, cache = check_cache(
        kv_collection,
        input_row_offsets,
        layer_idx,
        rows=rows,
        batch_offset=batch_offset,
        k=(k, axes),
        v=(v, axes),
    )
    keys, _ = kv_collection.layer(layer_idx)
    checks.check_dtype((keys.dtype, *wider), k=k, v=v)
    checks.check_same_place(**cache, k=k, v=v)
    checks.check_aligned_rows(k=k, v=v)
    return sizes


def _launch(
    backend: jit.Backend,
    tile: tiles.Instance,
    k: Any,
    v: Any,
    input_row_offsets: Any,
    kv_collection: Any,
    layer_idx: int,
    batch_offset: int,
) -> None:
    keys, _ = kv_collection.layer(layer_idx)
    vector = 16 // keys.dtype.itemsize
    backend.launch(
        tile,
        (-(-k.size // (vector * tile.threads)),),
        [
            k,
            v,
            signed(backend, input_row_offsets),
            *cache_arguments(backend, kv_collection, layer_idx, batch_offset),
            backend.error_word(),
            k.shape[0],
            input_row_offsets.shape[0] - 1,
            np.int64(k.strides[0] // k.dtype.itemsize),
            np.int64(v.strides[0] // v.dtype.itemsize),
            *cache_sizes(kv_collection, layer_idx),
        ],
    )
