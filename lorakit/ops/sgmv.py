"""Segmented LoRA products: shrink, expand, both, for several outputs of one input, and for q, k and v."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit import checks, jit, reference
from lorakit.dtypes import STORAGE
from lorakit.ops import _sgmv_launch
from lorakit.ops._metadata import check_cache, check_segments
from lorakit.ops.kv_cache import add_kv
from lorakit.ops.sgmv_route import LoRARoute, Segments, check_route, make_route


def sgmv_shrink(
    x: Any,
    lora_a: Any,
    lora_ids: Any,
    lora_ranks: Any,
    lora_grouped_offsets: Any,
    *,
    slot_ranks: Any = None,
    route: LoRARoute | None = None,
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
        route: What `sgmv_route` made from these rows and groups, or None: it is made here.

    Returns:
        ``[total_tokens, max_lora_rank]`` float32.

    Raises:
        ValueError, TypeError: Naming the argument.
    """
    segments = (lora_ids, lora_ranks, lora_grouped_offsets)
    _check_shrink(x, lora_a, segments, slot_ranks)
    check_route(route, x, segments, lora_a.shape[0])
    backend = jit.backend_of(x)
    if backend is None:
        return reference.sgmv_shrink(x, lora_a, *segments, slot_ranks=slot_ranks)
    h = backend.empty((_sgmv_launch.parts(x), x.shape[0], lora_a.shape[1]), np.float32)
    h[0].fill(0)
    route = route or make_route(x, segments, lora_a.shape[0])
    if route.items is not None:
        _sgmv_launch.shrink(backend, h, x, [lora_a], [slot_ranks], route, whole=True)
    return h[0] if len(h) == 1 else h[0].copy()


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
    route: LoRARoute | None = None,
) -> Any:
    """Multiply each row with its adapter's B, from the rank up, and add.

    For the rows ``t`` of group ``g`` with ``s = lora_ids[g] >= 0``,
    ``y[t] += h[t] @ lora_b[s].T + bias[s]``, reading the ranks that `sgmv_shrink` writes.

    Args:
        h: ``[total_tokens, max_lora_rank]`` float32.
        lora_b: ``[max_num_loras, out_dim, max_lora_rank]``, any strides; fastest where neighbouring
            outputs are neighbours in memory.
        lora_ids, lora_ranks, lora_grouped_offsets, slot_ranks, route: As in `sgmv_shrink`.
        bias: ``[max_num_loras, out_dim]`` in B's dtype, or None.
        add_to: ``[total_tokens, out_dim]`` in B's dtype or float32, rows may lie apart: added to in
            place, base rows untouched. None: zeros in B's dtype.

    Returns:
        `add_to`, or the new array. Rounded once.

    Raises:
        ValueError, TypeError: Naming the argument; nothing was written.
    """
    segments = (lora_ids, lora_ranks, lora_grouped_offsets)
    checks.check_shapes(
        h=(h, "total_tokens max_lora_rank"), lora_b=(lora_b, "max_num_loras out_dim max_lora_rank")
    )
    checks.check_dtype((np.float32,), h=h)
    checks.check_vectors(h=h)
    _check_expand("h", h, lora_b, segments, slot_ranks, bias, add_to)
    if add_to is not None:
        checks.check_disjoint("h and add_to", h, add_to)
    check_route(route, h, segments, lora_b.shape[0])
    backend = jit.backend_of(h)
    if backend is None:
        return reference.sgmv_expand(
            h, lora_b, *segments, slot_ranks=slot_ranks, bias=bias, add_to=add_to
        )
    y = backend.zeros((h.shape[0], lora_b.shape[1]), lora_b.dtype) if add_to is None else add_to
    route = route or make_route(h, segments, lora_b.shape[0])
    if route.items is not None:
        slices = [(y, 0, lora_b, slot_ranks, bias)]
        _sgmv_launch.expand(backend, h[None], slices, route, after_shrink=False)
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
    route: LoRARoute | None = None,
) -> Any:
    """Each row's LoRA delta, `sgmv_shrink` then `sgmv_expand` (MAX ``sgmv_lora_kernel``; Punica's SGMV).

    ``y[t] += (x[t] @ lora_a[s].T) @ lora_b[s].T + bias[s]``; the vector of the rank stays float32.

    An element is at most 1 ulp of y and ``c * 2**-24`` times the sum of all |terms| from exact, for float32 y
    only the latter. c is twice the additions in a row: at most 256 of columns, 4 of their sums, one for each
    1024 columns, the rank, bias and y. Of normally distributed operands it is below 4, without their signs
    below 32 and a quarter of the rank. For bfloat16 128 more, as two of them stand for each float32 of the
    vector of the rank. The norm of the error is 1.00 times that of rounding the exact result once.

    Args and errors are those of the two ops; `add_to` and the result as in `sgmv_expand`.
    """
    (y,) = sgmv_lora_slices(
        x,
        (lora_a,),
        (lora_b,),
        lora_ids,
        lora_ranks,
        lora_grouped_offsets,
        slot_ranks=(slot_ranks,),
        bias=(bias,),
        add_to=None if add_to is None else (add_to,),
        route=route,
    )
    return y


def sgmv_lora_slices(
    x: Any,
    lora_a: Sequence[Any],
    lora_b: Sequence[Any],
    lora_ids: Any,
    lora_ranks: Any,
    lora_grouped_offsets: Any,
    *,
    slot_ranks: Sequence[Any] | None = None,
    bias: Sequence[Any] | None = None,
    add_to: Sequence[Any] | None = None,
    route: LoRARoute | None = None,
) -> tuple[Any, ...]:
    """`sgmv_lora` for several outputs of one input, such as gate and up: x is read once.

    Up to three slices share a launch. Each has its own A, B, rank and width, and the same bits as by itself.
    Scratch memory is a float32 for each row, each rank of a launch and each 1024 columns of in_dim.

    Args:
        x: ``[total_tokens, in_dim]``.
        lora_a: An array ``[max_num_loras, max_lora_rank, in_dim]`` for each slice; the fewest slots
            count for all.
        lora_b: An array ``[max_num_loras, out_dim, max_lora_rank]`` for each slice.
        lora_ids, lora_ranks, lora_grouped_offsets, route: As in `sgmv_shrink`.
        slot_ranks, bias: An array or None for each slice, as in `sgmv_expand`; or None.
        add_to: An array for each slice, as in `sgmv_expand`, all of one dtype and none over another, nor
            over x if there are several; or None.

    Returns:
        The result of each slice, ``[total_tokens, out_dim]``.

    Raises:
        ValueError, TypeError: Naming the argument; nothing was written.
    """
    count = _count("lora_a", lora_a)
    if not count:
        raise ValueError("lora_a must have at least one array, got none")
    slot_ranks, bias = ((None,) * count if given is None else given for given in (slot_ranks, bias))
    _check_counts(f"{count} arrays", count, lora_b=lora_b, slot_ranks=slot_ranks, bias=bias)
    if add_to is not None:
        _check_counts(f"{count} arrays", count, add_to=add_to)
        for y in add_to:
            checks.check_shapes(add_to=(y, "total_tokens out_dim"))
    targets: list[Any] = [None] * count if add_to is None else list(add_to)
    segments = (lora_ids, lora_ranks, lora_grouped_offsets)
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        _check_lora(x, a, b, segments, slot_ranks[i], bias[i], targets[i])
    slots = min(a.shape[0] for a in lora_a)
    check_route(route, x, segments, slots)
    if add_to is not None:
        for one, other in itertools.combinations(targets, 2):
            checks.check_dtype((one.dtype,), add_to=other)
            checks.check_disjoint("add_to", one, other)
        for y in targets if count > 1 else ():
            checks.check_disjoint("x and add_to", x, y)
    backend = jit.backend_of(x)
    if backend is None:
        return reference.sgmv_lora_slices(
            x, lora_a, lora_b, *segments, slot_ranks=slot_ranks, bias=bias, add_to=add_to
        )
    if add_to is None:
        targets = [backend.zeros((x.shape[0], b.shape[1]), x.dtype) for b in lora_b]
    route = route or make_route(x, segments, slots)
    if route.items is not None:
        _sgmv_launch.lora(backend, x, lora_a, lora_b, slot_ranks, bias, targets, route)
    return tuple(targets)


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
    route: LoRARoute | None = None,
) -> Any:
    """The query delta; key and value deltas are added in place into the cache (MAX ``sgmv_qkv_lora_kernel``).

    The cache must already hold this step's base keys and values, not yet rotated. Each delta is rounded
    once: when the query delta is returned, when a key or value is stored.

    Args:
        x: ``[total_tokens, in_dim]`` in the cache's dtype.
        lora_a: Three arrays (q, k, v), each ``[max_num_loras, max_lora_rank, in_dim]``.
        lora_b: Three arrays ``[max_num_loras, out_dim, max_lora_rank]``; for keys and values out_dim is
            ``n_kv_heads * head_dim``.
        lora_ids, lora_ranks, lora_grouped_offsets, route: As in `sgmv_shrink`.
        input_row_offsets: ``[batch_size + 1]``, the rows of each sequence.
        kv_collection: The paged cache, as in `store_kv`.
        layer_idx: The layer of the cache.
        slot_ranks, bias: Three arrays each (or Nones) as in `sgmv_expand`, or None.

    Returns:
        ``[total_tokens, n_heads * head_dim]`` in x's dtype.

    Raises:
        ValueError, TypeError: Naming the argument; nothing was written.
    """
    slot_ranks = (None, None, None) if slot_ranks is None else slot_ranks
    bias = (None, None, None) if bias is None else bias
    _check_counts("three arrays (q, k, v)", 3, lora_a=lora_a, lora_b=lora_b)
    _check_counts("three arrays (q, k, v)", 3, slot_ranks=slot_ranks, bias=bias)
    checks.check_shapes(x=(x, "total_tokens in_dim"))
    rows = x.shape[0]
    sizes, cache = check_cache(kv_collection, input_row_offsets, layer_idx, rows=rows)
    checks.check_same_place(x=x, **cache)
    checks.check_dtype((x.dtype,), **cache)
    kv_shape = (rows, sizes["n_kv_heads"], sizes["head_dim"])
    segments = (lora_ids, lora_ranks, lora_grouped_offsets)
    for i, (part, a, b) in enumerate(zip("qkv", lora_a, lora_b, strict=True)):
        _check_lora(x, a, b, segments, slot_ranks[i], bias[i], None)
        if part != "q" and b.shape[1] != kv_shape[1] * kv_shape[2]:
            raise ValueError(
                f"lora_b of {part} must have n_kv_heads * head_dim = {kv_shape[1] * kv_shape[2]} outputs, "
                f"got {b.shape[1]}"
            )
    slots = min(a.shape[0] for a in lora_a)
    check_route(route, x, segments, slots)
    backend = jit.backend_of(x)
    if backend is None:
        return reference.sgmv_qkv_lora(
            x,
            lora_a,
            lora_b,
            *segments,
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
    route = route or make_route(x, segments, slots)
    if route.items is not None:
        _sgmv_launch.lora(backend, x, lora_a, lora_b, slot_ranks, bias, deltas, route)
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


def _check_counts(wanted: str, count: int, **sequences: Sequence[Any]) -> None:
    for name, sequence in sequences.items():
        if (found := _count(name, sequence)) != count:
            raise ValueError(f"{name} must have {wanted}, got {found}")


def _count(name: str, sequence: Any) -> int:
    if not isinstance(sequence, Sequence) and not getattr(sequence, "shape", ()):
        raise TypeError(f"{name} must be a sequence of arrays, got {type(sequence).__name__}")
    return len(sequence)


def _check_lora(
    x: Any, lora_a: Any, lora_b: Any, segments: Segments, slot_ranks: Any, bias: Any, add_to: Any
) -> None:
    checks.check_shapes(
        x=(x, "total_tokens in_dim"),
        lora_a=(lora_a, "max_num_loras max_lora_rank in_dim"),
        lora_b=(lora_b, "max_num_loras out_dim max_lora_rank"),
    )
    checks.check_dtype((x.dtype,), lora_b=lora_b)
    _check_shrink(x, lora_a, segments, slot_ranks)
    _check_expand("x", x, lora_b, segments, slot_ranks, bias, add_to)


def _check_shrink(x: Any, lora_a: Any, segments: Segments, slot_ranks: Any) -> None:
    sizes = checks.check_shapes(
        x=(x, "total_tokens in_dim"), lora_a=(lora_a, "max_num_loras max_lora_rank in_dim")
    )
    if sizes["in_dim"] < 1:
        raise ValueError(f"x must have at least one column, got {tuple(x.shape)}")
    checks.check_dtype(STORAGE, x=x)
    checks.check_dtype((x.dtype,), lora_a=lora_a)
    checks.check_same_place(x=x, lora_a=lora_a)
    checks.check_vectors(x=x)
    checks.check_whole_strides(lora_a=lora_a)
    check_segments(x, *segments, max_num_loras=sizes["max_num_loras"], slot_ranks=slot_ranks)


def _check_expand(
    name: str,
    rows_of: Any,
    lora_b: Any,
    segments: Segments,
    slot_ranks: Any,
    bias: Any,
    add_to: Any,
) -> None:
    rows, (max_num_loras, out_dim, _) = rows_of.shape[0], lora_b.shape
    checks.check_dtype(STORAGE, lora_b=lora_b)
    checks.check_same_place(**{name: rows_of, "lora_b": lora_b})
    checks.check_whole_strides(lora_b=lora_b)
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
        checks.check_whole_strides(add_to=add_to)
    check_segments(rows_of, *segments, max_num_loras=max_num_loras, slot_ranks=slot_ranks)
