"""Attention of a ragged batch over the paged cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorakit import checks, jit, reference, tiles
from lorakit.ops._metadata import check_cache, signed
from lorakit.ops.kv_cache import cache_arguments, cache_sizes

_MAX_KEYS = 2**30  # of one sequence, as in the kernel: a window of as many is no bound
_FEW_ROWS = 32  # of a key head, as has_few_rows in the kernels


def attention_ragged(
    q: Any,
    input_row_offsets: Any,
    kv_collection: Any,
    layer_idx: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    window: tuple[int | None, int | None] | None = None,
    soft_cap: float | None = None,
    sinks: Any = None,
) -> Any:
    """Attention of this step's queries over cached keys (MAX ``flash_attention_ragged``).

    Query ``i`` of sequence ``b`` stands at position ``cache_lengths[b] + i`` and, causal, sees the keys up
    to its own position: the mask is aligned bottom right. With 2 keys cached and 3 new tokens::

        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1

    With ``window=(2, None)`` also::

        1 1 1 0 0
        0 1 1 1 0
        0 0 1 1 1

    Query head ``h`` reads key head ``h // (n_heads / n_kv_heads)``.

    Slots past a sequence's end may hold anything, and so may keys before the window of all queries of a
    sequence. A value that is NaN or infinite may make queries of its own sequence NaN on a GPU though they
    do not see it, when a query some tokens away does: there a masked value is multiplied with 0.

    Args:
        q: ``[total_tokens, n_heads, head_dim]`` in the cache's dtype; rows may lie apart.
        input_row_offsets: ``[batch_size + 1]`` uint32 or int32.
        kv_collection: The paged cache, as in `store_kv`; keys and values of this step must have been
            stored. Its ``max_lengths[0, 0]`` is a bound on the new tokens of a sequence, in any replay of a
            graph; it decides which kernels are launched.
        layer_idx: The layer of the cache.
        scale: Multiplies the scores; None means ``head_dim ** -0.5``.
        causal: False lets every query see all keys of its sequence.
        return_lse: Return the log-sum-exp of the scores too (natural logarithm), with `sinks` of both.
        window: ``(left, right)``: a query at position ``p`` sees keys from ``p - left`` to ``p + right``
            only; None in a place means no bound there. Keys that no query near by sees are not read.
            (MAX ``local_window_size``.)
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``; None leaves them.
        sinks: ``[n_heads]``, float32 or q's dtype, where q is: a score for each query head that counts in
            the sum of exponentials, but has no value (MAX ``sink_weights``).

    Returns:
        ``[total_tokens, n_heads, head_dim]`` in q's dtype; 0 in rows that see no key. With `return_lse`
        a pair with ``[total_tokens, n_heads]`` float32, -inf in rows that see no key.

    Raises:
        ValueError, TypeError: Naming the argument.
    """
    rows = q.shape[0] if getattr(q, "shape", None) else 0
    sizes, cache = check_cache(
        kv_collection,
        input_row_offsets,
        layer_idx,
        rows=rows,
        q=(q, "total_tokens n_heads head_dim"),
    )
    n_heads, n_kv_heads = sizes["n_heads"], sizes["n_kv_heads"]
    checks.check_dtype((kv_collection.layer(layer_idx)[0].dtype,), q=q)
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"q must have a multiple of n_kv_heads = {n_kv_heads} heads, got {n_heads}"
        )
    group = n_heads // n_kv_heads
    if rows * group >= 2**31:
        raise ValueError(f"q must have less than 2^31 rows per key head, got {rows} tokens")
    if scale is not None:
        checks.check_number(scale, "scale")
    most_tokens = checks.check_max_lengths(kv_collection, input_row_offsets)
    left, right = checks.check_window(window)
    soft_cap = checks.check_soft_cap(soft_cap)
    checks.check_same_place(**cache, q=q)
    if sinks is not None:
        checks.check_sinks(sinks, n_heads, q.dtype)
        checks.check_same_place(q=q, sinks=sinks)
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
            window=(left, right),
            soft_cap=soft_cap,
            sinks=sinks,
        )
    out = backend.empty(q.shape, q.dtype)
    lse = backend.empty(q.shape[:2], np.float32) if return_lse else None
    if q.size == 0:
        return (out, lse) if return_lse else out

    where = [
        signed(backend, input_row_offsets),
        *cache_arguments(backend, kv_collection, layer_idx),
    ]
    sizes_of = [rows, sizes["batch_size"], n_heads, np.int64(q.strides[0] // q.dtype.itemsize)]
    sizes_of += [float(sizes["head_dim"] ** -0.5 if scale is None else scale)]
    sizes_of += [
        0.0 if soft_cap is None else soft_cap,
        -1 if left is None else min(left, _MAX_KEYS),
        0 if causal else -1 if right is None else min(right, _MAX_KEYS),
    ]
    in_float32 = sinks is None or sinks.dtype == np.float32
    where += [sinks if in_float32 else None, None if in_float32 else sinks]
    layer = cache_sizes(kv_collection, layer_idx)
    _decode(backend, [q, out, lse, *where], sizes_of, layer, most_tokens)
    has_many_rows = most_tokens > 1 and most_tokens * group > _FEW_ROWS
    if has_many_rows or not tiles.attention_decodes(q.dtype, sizes["head_dim"]):
        tile = tiles.attention_ragged(q.dtype, sizes["head_dim"])
        grid = (rows * group // tiles.attention_block_m(tile) + sizes["batch_size"] + 1, n_kv_heads)
        backend.launch(tile, grid, [q, out, lse, *where, backend.error_word(), *sizes_of, *layer])
    return (out, lse) if return_lse else out


def _decode(
    backend: jit.Backend, arrays: list[Any], sizes: list[Any], layer: list[Any], most_tokens: int
) -> None:
    """The sequences with few rows, and the rows past the last offset."""
    q, out, lse = arrays[:3]
    batch_size, n_heads = sizes[1:3]
    max_pages, page_size, n_kv_heads, head_dim = *layer[1:3], *layer[-2:]
    group = n_heads // n_kv_heads
    most_rows = min(most_tokens * group, max(_FEW_ROWS, group))
    tile = tiles.attention_decode(q.dtype, head_dim, most_rows)
    # Blocks of neighbouring key heads read the same tokens at the same time: of all, or of up to 16 of them.
    head_lanes = next(n for n in range(16, 0, -1) if n_kv_heads % n == 0)
    # The longest line of tiles there can be, and with it the most chunks that rows can have.
    most_tiles = max(
        1, -(-min(max_pages * page_size, _MAX_KEYS) // tiles.attention_decode_keys(tile))
    )
    rows = tiles.attention_decode_rows(tile)
    row_tiles = -(-most_rows // rows)
    line = batch_size * row_tiles * (n_kv_heads // head_lanes) * most_tiles
    blocks = head_lanes * max(1, min(backend.resident_blocks(tile) // head_lanes, line))
    slots, pairs = min(most_tiles, 128), -(-min(rows, most_rows) // 2)
    by_rows = batch_size * row_tiles * n_kv_heads <= blocks
    regions = batch_size * row_tiles * n_kv_heads if by_rows else blocks
    merge = tiles.attention_merge(q.dtype, head_dim)
    states = backend.empty((regions, slots, pairs * tiles.attention_pair_floats(merge)), np.float32)
    splits = backend.empty((blocks, 8), np.int32)
    work = [most_tokens, slots, pairs, row_tiles if by_rows else 0, head_lanes]
    backend.launch(
        tile,
        (blocks,),
        [*arrays, backend.error_word(), states, splits, *sizes, *work, *layer],
    )
    backend.launch(
        merge,
        (blocks,),
        [out, lse, states, splits, *arrays[-2:], n_heads, n_kv_heads, slots, pairs, head_dim],
    )
