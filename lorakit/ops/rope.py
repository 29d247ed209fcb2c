"""Rotary embedding of a ragged batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorakit import checks, jit, reference, tiles
from lorakit.dtypes import STORAGE
from lorakit.ops._metadata import check_cache, signed
from lorakit.ops.kv_cache import cache_arguments, cache_sizes


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
        kv_collection: The paged cache; keys of this step must have been stored.
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
    rows = q.shape[0] if getattr(q, "shape", None) else 0
    sizes = check_cache(
        kv_collection,
        input_row_offsets,
        layer_idx,
        rows=rows,
        q=(q, "total_tokens n_heads head_dim"),
        freqs_cis=(freqs_cis, "positions rotary_dim"),
    )
    blocks, rotary_dim, head_dim = kv_collection.blocks, sizes["rotary_dim"], sizes["head_dim"]
    checks.check_dtype(STORAGE, blocks=blocks)
    checks.check_dtype((blocks.dtype,), q=q)
    checks.check_dtype((np.float32,), freqs_cis=freqs_cis)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"freqs_cis must have an even number of columns up to head_dim = {head_dim}, "
            f"got {rotary_dim}"
        )
    if sizes["positions"] < 1:
        raise ValueError("freqs_cis must have a row for each position, got none")
    checks.check_same_place(blocks=blocks, q=q, freqs_cis=freqs_cis)
    checks.check_aligned_rows(q=q)
    checks.check_contiguous(freqs_cis=freqs_cis)
    checks.check_positions(freqs_cis, kv_collection, input_row_offsets)
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
            *cache_arguments(backend, kv_collection),
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
