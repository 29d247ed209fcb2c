"""Rotary embedding of a ragged batch, alone and together with the keys' and values' way into the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorakit import checks, jit, reference, tiles
from lorakit.ops._metadata import check_cache, signed
from lorakit.ops.kv_cache import cache_arguments, cache_sizes

_MOST_BLOCKS_Y = 65535  # of a grid


def rope_ragged(
    q: Any,
    input_row_offsets: Any,
    kv_collection: Any,
    freqs_cis: Any,
    layer_idx: int,
    *,
    interleaved: bool = True,
    rotate_last: bool = False,
) -> Any:
    """Rotate this step's queries, and in place this step's cached keys (MAX ``fused_qk_ragged_rope``).

    Pair ``j`` of a head at position ``p = cache_lengths[b] + t - input_row_offsets[b]``::

        (re, im) -> (re * cos - im * sin, re * sin + im * cos),  (cos, sin) = freqs_cis[p, 2j : 2j + 2]

    Args:
        q: ``[total_tokens, n_heads, head_dim]`` in the cache's dtype; rows may lie apart.
        input_row_offsets: ``[batch_size + 1]`` uint32 or int32.
        kv_collection: The paged cache, as in `store_kv`; keys of this step must have been stored.
        freqs_cis: ``[positions, rotary_dim]`` float32, rotary_dim even and at most head_dim.
        layer_idx: The layer of the cache.
        interleaved: Pair ``j`` is elements ``(2j, 2j + 1)`` of the rotated part; else ``(j, j +
            rotary_dim / 2)``, the order of Hugging Face checkpoints.
        rotate_last: The rotated part is the last `rotary_dim` elements of a head (MAX), not the first.

    Returns:
        The rotated queries, ``[total_tokens, n_heads, head_dim]``; the rest of a head is copied.

    Raises:
        ValueError, TypeError: Naming the argument; nothing was written.
    """
    where = (input_row_offsets, kv_collection, freqs_cis, layer_idx)
    sizes = _check(*where, q=(q, "total_tokens n_heads head_dim"))
    backend = jit.backend_of(q)
    if backend is None:
        return reference.rope_ragged(
            q,
            input_row_offsets,
            kv_collection,
            freqs_cis,
            layer_idx,
            interleaved=interleaved,
            rotate_last=rotate_last,
        )
    out = backend.empty(q.shape, q.dtype)
    rows, head_dim, rotary_dim = sizes["total_tokens"], sizes["head_dim"], sizes["rotary_dim"]
    if rows == 0:
        return out

    tile = tiles.rope_ragged(q.dtype, head_dim, rotary_dim, interleaved)
    per_thread = 2 * tiles.rope_pairs(tile)
    elements = rows * (sizes["n_heads"] + sizes["n_kv_heads"]) * head_dim
    backend.launch(
        tile,
        (-(-elements // (per_thread * tile.threads)),),
        [
            q,
            out,
            freqs_cis,
            signed(backend, input_row_offsets),
            *cache_arguments(backend, kv_collection, layer_idx),
            backend.error_word(),
            rows,
            sizes["batch_size"],
            sizes["n_heads"],
            np.int64(q.strides[0] // q.dtype.itemsize),
            sizes["positions"],
            rotary_dim,
            bool(rotate_last),
            *cache_sizes(kv_collection, layer_idx),
        ],
    )
    return out


def rope_store_kv(
    q: Any,
    k: Any,
    v: Any,
    input_row_offsets: Any,
    kv_collection: Any,
    freqs_cis: Any,
    layer_idx: int,
    *,
    interleaved: bool = True,
    rotate_last: bool = False,
) -> Any:
    """Rotate this step's queries and keys, and write keys and values into their pages, in one launch.

    The same bits as `store_kv`, then `rope_ragged`. With ``p`` the position of token ``t`` of
    sequence ``b``, and ``slot = (lookup_table[b, p // page_size], p % page_size)``::

        out[t] = rotated q[t],  keys of the layer at slot = rotated k[t],  values there = v[t]

    Args:
        q: ``[total_tokens, n_heads, head_dim]`` in the cache's dtype; rows may lie apart.
        k: ``[total_tokens, n_kv_heads, head_dim]`` in the cache's dtype; rows may lie apart.
        v: Like `k`.
        input_row_offsets, kv_collection, freqs_cis, layer_idx: As in `rope_ragged`.
        interleaved, rotate_last: As in `rope_ragged`.

    Returns:
        The rotated queries, ``[total_tokens, n_heads, head_dim]``; the rest of a head is copied.

    Raises:
        ValueError, TypeError: Naming the argument; nothing was written.
    """
    sizes = _check(
        input_row_offsets,
        kv_collection,
        freqs_cis,
        layer_idx,
        q=(q, "total_tokens n_heads head_dim"),
        k=(k, "total_tokens n_kv_heads head_dim"),
        v=(v, "total_tokens n_kv_heads head_dim"),
    )
    backend = jit.backend_of(q)
    if backend is None:
        return reference.rope_store_kv(
            q,
            k,
            v,
            input_row_offsets,
            kv_collection,
            freqs_cis,
            layer_idx,
            interleaved=interleaved,
            rotate_last=rotate_last,
        )
    out = backend.empty(q.shape, q.dtype)
    rows, head_dim, rotary_dim = sizes["total_tokens"], sizes["head_dim"], sizes["rotary_dim"]
    if q.size == k.size == 0:
        return out

    tile = tiles.rope_store_kv(q.dtype, head_dim, rotary_dim, interleaved)
    head_threads = head_dim // (2 * tiles.rope_pairs(tile))
    heads = sizes["n_heads"] + 2 * sizes["n_kv_heads"]
    passes, blocks = tiles.rope_store_passes(rows, heads, tile.threads // head_threads)
    grid_y = min(blocks, _MOST_BLOCKS_Y)
    backend.launch(
        tile,
        (rows, grid_y, -(-blocks // grid_y)),
        [
            q,
            k,
            v,
            out,
            freqs_cis,
            signed(backend, input_row_offsets),
            *cache_arguments(backend, kv_collection, layer_idx),
            backend.error_word(),
            rows,
            sizes["batch_size"],
            sizes["n_heads"],
            *(np.int64(array.strides[0] // array.dtype.itemsize) for array in (q, k, v)),
            sizes["positions"],
            rotary_dim,
            bool(rotate_last),
            passes,
            65536 // head_threads + 1,
            *cache_sizes(kv_collection, layer_idx),
        ],
    )
    return out


def _check(
    input_row_offsets: Any,
    kv_collection: Any,
    freqs_cis: Any,
    layer_idx: int,
    **rows: Any,
) -> dict[str, int]:
    """Sizes of a right call; `rows` are q and other arrays in the cache's dtype, each with its axes."""
    q = rows["q"][0]
    sizes, cache = check_cache(
        kv_collection,
        input_row_offsets,
        layer_idx,
        rows=q.shape[0] if getattr(q, "shape", None) else 0,
        **rows,
        freqs_cis=(freqs_cis, "positions rotary_dim"),
    )
    arrays = {name: array for name, (array, _) in rows.items()}
    rotary_dim, head_dim = sizes["rotary_dim"], sizes["head_dim"]
    checks.check_dtype((kv_collection.layer(layer_idx)[0].dtype,), **arrays)
    checks.check_dtype((np.float32,), freqs_cis=freqs_cis)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"freqs_cis must have an even number of columns up to head_dim = {head_dim}, "
            f"got {rotary_dim}"
        )
    if sizes["positions"] < 1:
        raise ValueError("freqs_cis must have a row for each position, got none")
    checks.check_same_place(**cache, **arrays, freqs_cis=freqs_cis)
    checks.check_aligned_rows(**arrays)
    checks.check_contiguous(freqs_cis=freqs_cis)
    checks.check_positions(freqs_cis, kv_collection, input_row_offsets)
    return sizes
