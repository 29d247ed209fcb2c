"""Attention of a ragged batch over the paged cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorakit import checks, jit, reference, tiles
from lorakit.dtypes import STORAGE
from lorakit.ops._metadata import check_cache, signed
from lorakit.ops.kv_cache import cache_arguments, cache_sizes


def attention_ragged(
    q: Any,
    input_row_offsets: Any,
    kv_collection: Any,
    layer_idx: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> Any:
    """Attention of this step's queries over all cached keys (MAX ``flash_attention_ragged``).

    Query ``i`` of sequence ``b`` stands at position ``cache_lengths[b] + i`` and, causal, sees the keys up
    to its own position: the mask is aligned bottom right. With 2 keys cached and 3 new tokens::

        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1

    Query head ``h`` reads key head ``h // (n_heads / n_kv_heads)``.

    Slots past a sequence's end may hold anything. A value of this step that is NaN or infinite may make
    earlier queries of its own sequence NaN on a GPU, where a masked value is multiplied with 0.

    Args:
        q: ``[total_tokens, n_heads, head_dim]`` in the cache's dtype; rows may lie apart.
        input_row_offsets: ``[batch_size + 1]`` uint32 or int32.
        kv_collection: The paged cache; keys and values of this step must have been stored.
        layer_idx: The layer of the cache.
        scale: Multiplies the scores; None means ``head_dim ** -0.5``.
        causal: False lets every query see all keys of its sequence.
        return_lse: Return the log-sum-exp of the scaled scores too (natural logarithm).

    Returns:
        ``[total_tokens, n_heads, head_dim]`` in q's dtype; 0 in rows that see no key. With `return_lse`
        a pair with ``[total_tokens, n_heads]`` float32, -inf in rows that see no key.

    Raises:
        ValueError, TypeError: Naming the argument.
    """
    rows = q.shape[0] if getattr(q, "shape", None) else 0
    sizes = check_cache(
        kv_collection,
        input_row_offsets,
        layer_idx,
        rows=rows,
        q=(q, "total_tokens n_heads head_dim"),
    )
    blocks, n_heads, n_kv_heads = kv_collection.blocks, sizes["n_heads"], sizes["n_kv_heads"]
    checks.check_dtype(STORAGE, blocks=blocks)
    checks.check_dtype((blocks.dtype,), q=q)
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"q must have a multiple of n_kv_heads = {n_kv_heads} heads, got {n_heads}"
        )
    if rows * (n_heads // n_kv_heads) >= 2**31:
        raise ValueError(f"q must have less than 2^31 rows per key head, got {rows} tokens")
    if scale is not None:
        checks.check_number(scale, "scale")
    checks.check_same_place(blocks=blocks, q=q)
    checks.check_aligned_rows(q=q)
    backend = jit.backend_of(q)
    if backend is None:
        return reference.attention_ragged(
            q,
            input_row_offsets,
            kv_collection,
            layer_idx,
            scale=scale,
            causal=causal,
            return_lse=return_lse,
        )
    out = backend.empty(q.shape, q.dtype)
    lse = backend.empty(q.shape[:2], np.float32) if return_lse else None
    if q.size == 0:
        return (out, lse) if return_lse else out

    tile = tiles.attention_ragged(q.dtype, sizes["head_dim"])
    packed_rows = rows * (n_heads // n_kv_heads)
    backend.launch(
        tile,
        (packed_rows // tiles.attention_block_m(tile) + sizes["batch_size"] + 1, n_kv_heads),
        [
            q,
            out,
            lse,
            signed(backend, input_row_offsets),
            *cache_arguments(backend, kv_collection),
            backend.error_word(),
            rows,
            sizes["batch_size"],
            n_heads,
            np.int64(q.strides[0] // q.dtype.itemsize),
            float(sizes["head_dim"] ** -0.5 if scale is None else scale),
            bool(causal),
            *cache_sizes(kv_collection, layer_idx),
        ],
    )
    return (out, lse) if return_lse else out
