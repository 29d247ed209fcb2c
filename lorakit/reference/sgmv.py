"""References of the segmented LoRA products: one adapter for each group of consecutive rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.reference.kv_cache import KVCache, new_tokens, store_kv


def live_groups(
    max_rank: int,
    lora_ids: NDArray[Any],
    lora_ranks: NDArray[Any] | None,
    lora_grouped_offsets: NDArray[Any],
    slot_ranks: NDArray[Any] | None,
) -> Iterator[tuple[slice, int, int]]:
    """``(rows, slot, effective rank)`` of each group that has an adapter.

    The effective rank is the smallest of ``max_rank``, ``slot_ranks[slot]`` and ``lora_ranks[g]``.
    Rows that no item covers are base rows: those of negative ids and those past the last offset.
    """
    for group, slot in enumerate(lora_ids):
        if slot >= 0:
            rank = max_rank
            if slot_ranks is not None:
                rank = min(rank, int(slot_ranks[slot]))
            if lora_ranks is not None:
                rank = min(rank, int(lora_ranks[group]))
            start, stop = lora_grouped_offsets[group : group + 2]
            yield slice(int(start), int(stop)), int(slot), rank


def sgmv_shrink(
    x: NDArray[Any],
    lora_a: NDArray[Any],
    lora_ids: NDArray[Any],
    lora_ranks: NDArray[Any] | None,
    lora_grouped_offsets: NDArray[Any],
    *,
    slot_ranks: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """``h[t, r] = sum_k x[t, k] * lora_a[slot, r, k]`` for ``r`` < effective rank, else 0.

    Args:
        x: ``[total_tokens, in_dim]``.
        lora_a: ``[max_num_loras, max_lora_rank, in_dim]``; rows past the effective rank are not
            read.
        lora_ids: ``[groups]`` int32, slot of each group, negative for base rows.
        lora_ranks: ``[groups]``, an upper bound of each group's rank, or None.
        lora_grouped_offsets: ``[groups + 1]``, first row of each group, then the end of the last.
        slot_ranks: ``[max_num_loras]``, true rank of each slot, or None.

    Returns:
        ``[total_tokens, max_lora_rank]`` float32; base rows are 0.
    """
    h = np.zeros((len(x), lora_a.shape[1]), np.promote_types(x.dtype, np.float32))
    for rows, slot, rank in live_groups(
        lora_a.shape[1], lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks
    ):
        a = lora_a[slot, :rank].astype(np.float64)
        h[rows, :rank] = x[rows].astype(np.float64) @ a.T
    return h


def sgmv_expand(
    h: NDArray[Any],
    lora_b: NDArray[Any],
    lora_ids: NDArray[Any],
    lora_ranks: NDArray[Any] | None,
    lora_grouped_offsets: NDArray[Any],
    *,
    slot_ranks: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    add_to: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """``delta[t, n] = sum_{r < effective rank} h[t, r] * lora_b[slot, n, r] (+ bias[slot, n])``.

    Args:
        h: ``[total_tokens, max_lora_rank]`` float32.
        lora_b: ``[max_num_loras, out_dim, max_lora_rank]``; columns past the effective rank are not
            read.
        lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks: as in :func:`sgmv_shrink`.
        bias: ``[max_num_loras, out_dim]`` or None; added once to every row that has an adapter.
        add_to: ``[total_tokens, out_dim]`` or None; updated in place to ``round(add_to + delta)``,
            base rows not touched.

    Returns:
        ``add_to``, or without it the delta in ``lora_b``'s dtype, 0 in base rows.
    """
    y = np.zeros((len(h), lora_b.shape[1]), lora_b.dtype) if add_to is None else add_to
    for rows, slot, rank in live_groups(
        lora_b.shape[2], lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks
    ):
        delta = h[rows, :rank].astype(np.float64) @ lora_b[slot, :, :rank].astype(np.float64).T
        if bias is not None:
            delta += bias[slot]
        y[rows] = (y[rows].astype(np.float64) + delta).astype(y.dtype)
    return y


def sgmv_lora(
    x: NDArray[Any],
    lora_a: NDArray[Any],
    lora_b: NDArray[Any],
    lora_ids: NDArray[Any],
    lora_ranks: NDArray[Any] | None,
    lora_grouped_offsets: NDArray[Any],
    *,
    slot_ranks: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    add_to: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """``(x @ lora_a[slot].T) @ lora_b[slot].T (+ bias[slot])``: shrink, then expand.

    The rank vector between them stays float32. Arguments and result are those of
    :func:`sgmv_shrink` and :func:`sgmv_expand`.
    """
    groups = (lora_ids, lora_ranks, lora_grouped_offsets)
    h = sgmv_shrink(x, lora_a, *groups, slot_ranks=slot_ranks)
    return sgmv_expand(h, lora_b, *groups, slot_ranks=slot_ranks, bias=bias, add_to=add_to)


def sgmv_lora_slices(
    x: NDArray[Any],
    lora_a: Sequence[NDArray[Any]],
    lora_b: Sequence[NDArray[Any]],
    lora_ids: NDArray[Any],
    lora_ranks: NDArray[Any] | None,
    lora_grouped_offsets: NDArray[Any],
    *,
    slot_ranks: Sequence[NDArray[Any] | None] | None = None,
    bias: Sequence[NDArray[Any] | None] | None = None,
    add_to: Sequence[NDArray[Any]] | None = None,
) -> tuple[NDArray[Any], ...]:
    """:func:`sgmv_lora` of each slice: ``lora_a[i]``, ``lora_b[i]``, ``slot_ranks[i]`` and so on."""
    return tuple(
        sgmv_lora(
            x,
            a,
            b,
            lora_ids,
            lora_ranks,
            lora_grouped_offsets,
            slot_ranks=None if slot_ranks is None else slot_ranks[i],
            bias=None if bias is None else bias[i],
            add_to=None if add_to is None else add_to[i],
        )
        for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True))
    )


def sgmv_qkv_lora(
    x: NDArray[Any],
    lora_a: Sequence[NDArray[Any]],
    lora_b: Sequence[NDArray[Any]],
    lora_ids: NDArray[Any],
    lora_ranks: NDArray[Any] | None,
    lora_grouped_offsets: NDArray[Any],
    input_row_offsets: NDArray[Any],
    kv_collection: KVCache,
    layer_idx: int,
    *,
    slot_ranks: Sequence[NDArray[Any] | None] | None = None,
    bias: Sequence[NDArray[Any] | None] | None = None,
) -> NDArray[Any]:
    """Returns the query delta and adds the key and value deltas into the cache, each rounded once.

    The deltas are added at the positions of this step (:func:`lorakit.reference.add_kv`), before
    any rotation. Cache slots of base rows keep their bits.

    Args:
        x: ``[total_tokens, hidden_size]``.
        lora_a: three ``[max_num_loras, max_lora_rank, hidden_size]``, for q, k and v.
        lora_b: three ``[max_num_loras, out_dim, max_lora_rank]``; ``out_dim`` is ``n_heads *
            head_dim`` for q, ``n_kv_heads * head_dim`` for k and v.
        lora_ids, lora_ranks, lora_grouped_offsets: as in :func:`sgmv_shrink`.
        input_row_offsets: ``[batch_size + 1]``.
        kv_collection: see :class:`KVCache`; its layer is added to.
        layer_idx: layer of the cache.
        slot_ranks: three of ``[max_num_loras]`` or None, or None for all three.
        bias: three of ``[max_num_loras, out_dim]`` or None, or None for all three.

    Returns:
        ``[total_tokens, n_heads * head_dim]`` in ``x``'s dtype, 0 in base rows.
    """

    def lora(part: int, add_to: NDArray[Any] | None) -> NDArray[Any]:
        return sgmv_lora(
            x,
            lora_a[part],
            lora_b[part],
            lora_ids,
            lora_ranks,
            lora_grouped_offsets,
            slot_ranks=None if slot_ranks is None else slot_ranks[part],
            bias=None if bias is None else bias[part],
            add_to=add_to,
        )

    # Read, add and put back, rather than add_kv: adding 0 to a base row would turn -0 into 0.
    keys, values = kv_collection.layer(layer_idx)
    _, page_size, n_kv_heads, head_dim = keys.shape
    kv = np.zeros((2, len(x), n_kv_heads, head_dim), keys.dtype)
    for rows, pages, slots in new_tokens(input_row_offsets, kv_collection, page_size):
        kv[0, rows] = keys[pages, slots]
        kv[1, rows] = values[pages, slots]
    flat = kv.reshape(2, len(x), n_kv_heads * head_dim)
    lora(1, flat[0])
    lora(2, flat[1])
    store_kv(kv[0], kv[1], input_row_offsets, kv_collection, layer_idx)
    return lora(0, None)
