"""Reference of the rotary embedding of a ragged batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.reference.kv_cache import KVCache, new_tokens, store_kv


def rotate(
    x: NDArray[Any], freqs_cis: NDArray[Any], interleaved: bool, rotate_last: bool
) -> NDArray[Any]:
    """Rotates ``x[t]``, ``[heads, head_dim]``, by ``freqs_cis[t]``, ``[rotary_dim]``."""
    rotary_dim = freqs_cis.shape[1]
    first = x.shape[2] - rotary_dim if rotate_last else 0
    if interleaved:  # pairs (0, 1), (2, 3), ...
        re, im = (slice(first + i, first + rotary_dim, 2) for i in (0, 1))
    else:  # pairs (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ...
        middle = first + rotary_dim // 2
        re, im = slice(first, middle), slice(middle, first + rotary_dim)

    x64 = x.astype(np.float64)
    table = freqs_cis.astype(np.float64)[:, np.newaxis]
    cos, sin = table[..., 0::2], table[..., 1::2]
    out = x.copy()
    out[..., re] = (x64[..., re] * cos - x64[..., im] * sin).astype(x.dtype)
    out[..., im] = (x64[..., re] * sin + x64[..., im] * cos).astype(x.dtype)
    return out


def rope_ragged(
    q: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    freqs_cis: NDArray[Any],
    layer_idx: int,
    *,
    interleaved: bool = True,
    rotate_last: bool = False,
) -> NDArray[Any]:
    """Rotates the queries, and in place the cached keys of this step, by their positions.

    A pair ``(re, im)`` of a token at position ``p = cache_lengths[b] + t - input_row_offsets[b]``
    becomes ``(re * cos - im * sin, re * sin + im * cos)`` with row ``p`` of the table. Elements
    that are not rotated keep their bits. MAX: ``fused_qk_ragged_rope``.

    Args:
        q: ``[total_tokens, n_heads, head_dim]``.
        input_row_offsets: ``[batch_size + 1]``.
        kv_collection: see :class:`KVCache`; this step's keys are rotated.
        freqs_cis: ``[positions, rotary_dim]`` float32, ``cos_0, sin_0, cos_1, sin_1, ...``,
            whatever ``interleaved`` says; ``rotary_dim <= head_dim`` is even.
        layer_idx: layer of the cache.
        interleaved: pair ``j`` is elements ``(2j, 2j + 1)``; else ``(j, j + rotary_dim / 2)``,
            Hugging Face's layout.
        rotate_last: rotate the last ``rotary_dim`` elements of a head (MAX), not the first.

    Returns:
        The rotated queries, new and contiguous; rows past the last offset are copied.
    """
    out = q.copy()
    keys, _ = kv_collection.layer(layer_idx)
    tokens = new_tokens(input_row_offsets, kv_collection, keys.shape[1])
    for b, (rows, pages, slots) in enumerate(tokens):
        position = int(kv_collection.cache_lengths[b])
        table = freqs_cis[position : position + rows.stop - rows.start]
        out[rows] = rotate(q[rows], table, interleaved, rotate_last)
        keys[pages, slots] = rotate(keys[pages, slots], table, interleaved, rotate_last)
    return out


def rope_store_kv(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    freqs_cis: NDArray[Any],
    layer_idx: int,
    *,
    interleaved: bool = True,
    rotate_last: bool = False,
) -> NDArray[Any]:
    """Stores this step's keys and values, then rotates queries and keys; a key is rounded once.

    Args:
        q: ``[total_tokens, n_heads, head_dim]``.
        k, v: ``[total_tokens, n_kv_heads, head_dim]``, the cache's dtype.
        input_row_offsets, kv_collection, freqs_cis, layer_idx, interleaved, rotate_last: as in
            :func:`rope_ragged`.

    Returns:
        The rotated queries, new and contiguous; rows past the last offset are copied.
    """
    store_kv(k, v, input_row_offsets, kv_collection, layer_idx)
    return rope_ragged(
        q,
        input_row_offsets,
        kv_collection,
        freqs_cis,
        layer_idx,
        interleaved=interleaved,
        rotate_last=rotate_last,
    )
