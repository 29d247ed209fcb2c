"""Segmented LoRA products: shrink, expand, both, and both for queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit import checks, jit, reference, tiles
from lorakit.dtypes import STORAGE
from lorakit.ops._metadata import check_cache, check_metadata_place, check_segments, signed
from lorakit.ops.kv_cache import add_kv


def sgmv_shrink(
    x: Any,
    lora_a: Any,
    lora_ids: Any,
    lora_ranks: Any,
    lora_grouped_offsets: Any,
    *,
    slot_ranks: Any = None,
) -> Any:
    """Multiply each row with its adapter's A, down to the rank.

    For the rows ``t`` of group ``g`` with ``s = lora_ids[g] >= 0``, ``h[t] = x[t] @ lora_a[s].T``, in its
    first ``min(max_lora_rank, slot_ranks[s], lora_ranks[g])`` elements; 0 elsewhere and in base rows.

    Args:
        x: ``[total_tokens, in_dim]`` float32, float16 or bfloat16.
        lora_a: ``[max_num_loras, max_lora_rank, in_dim]`` in x's dtype, any strides.
        lora_ids: ``[groups]`` int32 slots; negative: base model.
        lora_ranks: ``[groups]`` uint32 or int32 upper bounds of the rank, or None.
        lora_grouped_offsets: ``[groups + 1]`` uint32 or int32 row offsets; rows past the last are base rows.
        slot_ranks: ``[max_num_loras]`` int32 true ranks, or None for full rank.

    Returns:
        ``[total_tokens, max_lora_rank]`` float32.

    Raises:
        ValueError, TypeError: Naming the argument.
    """
    segments = (lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks)
    _check_shrink(x, lora_a, segments)
    backend = jit.backend_of(x)
    if backend is None:
        return reference.sgmv_shrink(
            x, lora_a, lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks=slot_ranks
        )
    h = backend.zeros((x.shape[0], lora_a.shape[1]), np.float32)
    _shrink_into(backend, h, x, lora_a, segments)
    return h


def sgmv_expand(
    h: Any,
    lora_b: Any,
    lora_ids: Any,
    lora_ranks: Any,
    lora_grouped_offsets: Any,
    *,
    slot_ranks: Any = None,
    bias: Any = None,
    add_to: Any = None,
) -> Any:
    """Multiply each row with its adapter's B, from the rank up, and add.

    For the rows ``t`` of group ``g`` with ``s = lora_ids[g] >= 0``,
    ``y[t] += h[t] @ lora_b[s].T + bias[s]``, reading the ranks that `sgmv_shrink` writes.

    Args:
        h: ``[total_tokens, max_lora_rank]`` float32.
        lora_b: ``[max_num_loras, out_dim, max_lora_rank]``, any strides; fastest where neighbouring
            outputs are neighbours in memory.
        lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks: As in `sgmv_shrink`.
        bias: ``[max_num_loras, out_dim]`` in B's dtype, or None.
        add_to: ``[total_tokens, out_dim]`` in B's dtype or float32, rows may lie apart: added to in
            place, base rows untouched. None: zeros in B's dtype.

    Returns:
        `add_to`, or the new array. Rounded once.

    Raises:
        ValueError, TypeError: Naming the argument; nothing was written.
    """
    segments = (lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks)
    checks.check_shapes(
        h=(h, "total_tokens max_lora_rank"), lora_b=(lora_b, "max_num_loras out_dim max_lora_rank")
    )
    checks.check_dtype((np.float32,), h=h)
    checks.check_vectors(h=h)
    _check_expand("h", h, lora_b, segments, bias, add_to)
    backend = jit.backend_of(h)
    if backend is None:
        return reference.sgmv_expand(
            h,
            lora_b,
            lora_ids,
            lora_ranks,
            lora_grouped_offsets,
            slot_ranks=slot_ranks,
            bias=bias,
            add_to=add_to,
        )
    y = backend.zeros((h.shape[0], lora_b.shape[1]), lora_b.dtype) if add_to is None else add_to
    _expand_into(backend, y, h, lora_b, segments, bias)
    return y


def sgmv_lora(
    x: Any,
    lora_a: Any,
    lora_b: Any,
    lora_ids: Any,
    lora_ranks: Any,
    lora_grouped_offsets: Any,
    *,
    slot_ranks: Any = None,
    bias: Any = None,
    add_to: Any = None,
) -> Any:
    """Each row's LoRA delta, `sgmv_shrink` then `sgmv_expand` (MAX ``sgmv_lora_kernel``; Punica's SGMV).

    ``y[t] += (x[t] @ lora_a[s].T) @ lora_b[s].T + bias[s]``; the vector of the rank stays float32.

    Args and errors are those of the two ops; `add_to` and the result as in `sgmv_expand`.
    """
    segments = (lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks)
    checks.check_shapes(
        x=(x, "total_tokens in_dim"),
        lora_a=(lora_a, "max_num_loras max_lora_rank in_dim"),
        lora_b=(lora_b, "max_num_loras out_dim max_lora_rank"),
    )
    checks.check_dtype((x.dtype,), lora_b=lora_b)
    _check_shrink(x, lora_a, segments)
    _check_expand("x", x, lora_b, segments, bias, add_to)
    backend = jit.backend_of(x)
    if backend is None:
        return reference.sgmv_lora(
            x,
            lora_a,
            lora_b,
            lora_ids,
            lora_ranks,
            lora_grouped_offsets,
            slot_ranks=slot_ranks,
            bias=bias,
            add_to=add_to,
        )
    y = backend.zeros((x.shape[0], lora_b.shape[1]), x.dtype) if add_to is None else add_to
    h = backend.empty(
        (x.shape[0], lora_a.shape[1]), np.float32
    )  # expand reads only what shrink writes
    _shrink_into(backend, h, x, lora_a, segments)
    _expand_into(backend, y, h, lora_b, segments, bias)
    return y


def sgmv_qkv_lora(
    x: Any,
    lora_a: Sequence[Any],
    lora_b: Sequence[Any],
    lora_ids: Any,
    lora_ranks: Any,
    lora_grouped_offsets: Any,
    input_row_offsets: Any,
    kv_collection: Any,
    layer_idx: int,
    *,
    slot_ranks: Sequence[Any] | None = None,
    bias: Sequence[Any] | None = None,
) -> Any:
    """The query delta; key and value deltas are added in place into the cache (MAX ``sgmv_qkv_lora_kernel``).

    The cache must already hold this step's base keys and values, not yet rotated. Each delta is rounded
    once: when the query delta is returned, when a key or value is stored.

    Args:
        x: ``[total_tokens, in_dim]`` in the cache's dtype.
        lora_a: Three arrays (q, k, v), each ``[max_num_loras, max_lora_rank, in_dim]``.
        lora_b: Three arrays ``[max_num_loras, out_dim, max_lora_rank]``; for keys and values out_dim is
            ``n_kv_heads * head_dim``.
        lora_ids, lora_ranks, lora_grouped_offsets: As in `sgmv_shrink`.
        input_row_offsets: ``[batch_size + 1]``, the rows of each sequence.
        kv_collection: The paged cache.
        layer_idx: The layer of the cache.
        slot_ranks, bias: Three arrays each (or Nones) as in `sgmv_expand`, or None.

    Returns:
        ``[total_tokens, n_heads * head_dim]`` in x's dtype.

    Raises:
        ValueError, TypeError: Naming the argument; nothing was written.
    """
    slot_ranks = (None, None, None) if slot_ranks is None else slot_ranks
    bias = (None, None, None) if bias is None else bias
    for name, triple in (
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        ("slot_ranks", slot_ranks),
        ("bias", bias),
    ):
        if len(triple) != 3:
            raise ValueError(f"{name} must have three arrays (q, k, v), got {len(triple)}")
    checks.check_shapes(x=(x, "total_tokens in_dim"))
    rows = x.shape[0]
    sizes = check_cache(kv_collection, input_row_offsets, layer_idx, rows=rows)
    blocks = kv_collection.blocks
    checks.check_same_place(x=x, blocks=blocks)
    checks.check_dtype((x.dtype,), blocks=blocks)
    kv_shape = (rows, sizes["n_kv_heads"], sizes["head_dim"])
    for part, a, b, part_ranks, part_bias in zip(
        "qkv", lora_a, lora_b, slot_ranks, bias, strict=True
    ):
        segments = (lora_ids, lora_ranks, lora_grouped_offsets, part_ranks)
        checks.check_shapes(
            x=(x, "total_tokens in_dim"),
            lora_a=(a, "max_num_loras max_lora_rank in_dim"),
            lora_b=(b, "max_num_loras out_dim max_lora_rank"),
        )
        checks.check_dtype((x.dtype,), lora_b=b)
        _check_shrink(x, a, segments)
        _check_expand("x", x, b, segments, part_bias, None)
        if part != "q" and b.shape[1] != kv_shape[1] * kv_shape[2]:
            raise ValueError(
                f"lora_b of {part} must have n_kv_heads * head_dim = {kv_shape[1] * kv_shape[2]} outputs, "
                f"got {b.shape[1]}"
            )
    backend = jit.backend_of(x)
    if backend is None:
        return reference.sgmv_qkv_lora(
            x,
            lora_a,
            lora_b,
            lora_ids,
            lora_ranks,
            lora_grouped_offsets,
            input_row_offsets,
            kv_collection,
            layer_idx,
            slot_ranks=slot_ranks,
            bias=bias,
        )

    deltas = [
        backend.zeros((rows, lora_b[0].shape[1]), x.dtype),
        _negative_zeros(backend, (rows, lora_b[1].shape[1])),
        _negative_zeros(backend, (rows, lora_b[2].shape[1])),
    ]
    for delta, a, b, part_ranks, part_bias in zip(
        deltas, lora_a, lora_b, slot_ranks, bias, strict=True
    ):
        segments = (lora_ids, lora_ranks, lora_grouped_offsets, part_ranks)
        h = backend.empty((rows, a.shape[1]), np.float32)
        _shrink_into(backend, h, x, a, segments)
        _expand_into(backend, delta, h, b, segments, part_bias)
    add_kv(
        deltas[1].reshape(kv_shape),
        deltas[2].reshape(kv_shape),
        input_row_offsets,
        kv_collection,
        layer_idx,
    )
    return deltas[0]


def _negative_zeros(backend: jit.Backend, shape: tuple[int, int]) -> Any:
    """float32 -0.0, which added leaves every number as it is, 0.0 too: base rows keep their bits.

    By their bits, since whoever fills an array with a value equal to 0 may clear it instead.
    """
    return backend.full(shape, np.uint32, 0x8000_0000).view(np.float32)


Segments = tuple[Any, Any, Any, Any]  # lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks


def _check_shrink(x: Any, lora_a: Any, segments: Segments) -> None:
    sizes = checks.check_shapes(
        x=(x, "total_tokens in_dim"), lora_a=(lora_a, "max_num_loras max_lora_rank in_dim")
    )
    if sizes["in_dim"] < 1:
        raise ValueError(f"x must have at least one column, got {tuple(x.shape)}")
    checks.check_dtype(STORAGE, x=x)
    checks.check_dtype((x.dtype,), lora_a=lora_a)
    checks.check_same_place(x=x, lora_a=lora_a)
    checks.check_vectors(x=x)
    _check_segments(x, segments, sizes["max_num_loras"])


def _check_expand(
    name: str, rows_of: Any, lora_b: Any, segments: Segments, bias: Any, add_to: Any
) -> None:
    rows, (max_num_loras, out_dim, _) = rows_of.shape[0], lora_b.shape
    checks.check_dtype(STORAGE, lora_b=lora_b)
    checks.check_same_place(**{name: rows_of, "lora_b": lora_b})
    if bias is not None:
        checks.check_shapes(bias=(bias, f"{max_num_loras} {out_dim}"))
        checks.check_dtype((lora_b.dtype,), bias=bias)
        checks.check_same_place(lora_b=lora_b, bias=bias)
        checks.check_vectors(bias=bias)
    if add_to is not None:
        checks.check_shapes(add_to=(add_to, f"{rows} {out_dim}"))
        checks.check_dtype((lora_b.dtype, np.float32), add_to=add_to)
        checks.check_same_place(lora_b=lora_b, add_to=add_to)
        checks.check_rows_apart(add_to=add_to)
    _check_segments(rows_of, segments, max_num_loras)


def _check_segments(rows_of: Any, segments: Segments, max_num_loras: int) -> None:
    lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks = segments
    check_segments(
        lora_ids,
        lora_ranks,
        lora_grouped_offsets,
        slot_ranks,
        rows=rows_of.shape[0],
        max_num_loras=max_num_loras,
    )
    check_metadata_place(
        rows_of,
        lora_ids=lora_ids,
        lora_ranks=lora_ranks,
        lora_grouped_offsets=lora_grouped_offsets,
        slot_ranks=slot_ranks,
    )


def _shrink_into(backend: jit.Backend, h: Any, x: Any, lora_a: Any, segments: Segments) -> None:
    lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks = segments
    max_num_loras, max_lora_rank, in_dim = lora_a.shape
    groups = lora_ids.shape[0]
    if h.size == 0 or groups == 0 or max_num_loras == 0:
        return

    vector = 16 // x.dtype.itemsize
    strides = [stride // x.dtype.itemsize for stride in lora_a.strides]
    aligned = in_dim % vector == 0 and strides[2] == 1 and checks.is_aligned(x, lora_a)
    tile = tiles.sgmv_shrink(x.dtype, max_lora_rank, aligned)
    backend.launch(
        tile,
        (
            x.shape[0] // tiles.SGMV_BLOCK_M + groups + 1,
            -(-max_lora_rank // tiles.sgmv_shrink_block_r(tile)),
        ),
        [
            x,
            lora_a,
            signed(backend, lora_ids),
            signed(backend, lora_ranks),
            signed(backend, lora_grouped_offsets),
            signed(backend, slot_ranks),
            h,
            backend.error_word(),
            x.shape[0],
            groups,
            in_dim,
            max_num_loras,
            max_lora_rank,
            *map(np.int64, strides),
        ],
    )


def _expand_into(
    backend: jit.Backend, y: Any, h: Any, lora_b: Any, segments: Segments, bias: Any
) -> None:
    lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks = segments
    max_num_loras, out_dim, max_lora_rank = lora_b.shape
    groups = lora_ids.shape[0]
    if y.size == 0 or groups == 0 or max_num_loras == 0:
        return

    vector = 16 // lora_b.dtype.itemsize
    strides = [stride // lora_b.dtype.itemsize for stride in lora_b.strides]
    rank_major = lora_b.transpose(0, 2, 1)
    aligned = out_dim % vector == 0 and strides[1] == 1 and checks.is_aligned(y, rank_major)
    tile = tiles.sgmv_expand(lora_b.dtype, y.dtype, aligned)
    backend.launch(
        tile,
        (
            h.shape[0] // tiles.SGMV_BLOCK_M + groups + 1,
            -(-out_dim // tiles.SGMV_EXPAND_BLOCK_N),
        ),
        [
            h,
            lora_b,
            bias,
            signed(backend, lora_ids),
            signed(backend, lora_ranks),
            signed(backend, lora_grouped_offsets),
            signed(backend, slot_ranks),
            y,
            backend.error_word(),
            h.shape[0],
            groups,
            out_dim,
            max_num_loras,
            max_lora_rank,
            np.int64(strides[0]),
            np.int64(strides[2]),
            np.int64(strides[1]),
            np.int64(y.strides[0] // y.dtype.itemsize),
        ],
    )
