"""Launches of the segmented LoRA products: all slices of one x at once, after all checks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit import checks, jit, tiles
from lorakit.ops._metadata import signed
from lorakit.ops.sgmv_route import LoRARoute


def lora(
    backend: jit.Backend,
    x: Any,
    lora_a: Sequence[Any],
    lora_b: Sequence[Any],
    slot_ranks: Sequence[Any],
    bias: Sequence[Any],
    y: Sequence[Any],
    route: LoRARoute,
) -> None:
    """Add each slice's delta to its `y`: any number of slices, as many as fit in a launch."""
    slot_ranks = [signed(backend, ranks) for ranks in slot_ranks]
    for first in range(0, len(y), tiles.SGMV_MAX_SLICES):
        some = slice(first, first + tiles.SGMV_MAX_SLICES)
        width = sum(16 * _blocks(a) for a in lora_a[some])
        h = backend.empty((parts(x), x.shape[0], width), np.float32)
        h, columns = shrink(backend, h, x, lora_a[some], slot_ranks[some], route)
        slices = zip(y[some], columns, lora_b[some], slot_ranks[some], bias[some], strict=True)
        for _, same_dtype in itertools.groupby(slices, lambda of: of[0].dtype):
            expand(backend, h, list(same_dtype), route, after_shrink=width > 0)


def parts(x: Any) -> int:
    """Parts of in_dim, whose sums lie apart in h."""
    return int(-(-x.shape[1] // tiles.SGMV_PART_K))


def _blocks(lora_a: Any) -> int:
    """Blocks of 16 ranks."""
    return int(-(-lora_a.shape[1] // 16))


def shrink(
    backend: jit.Backend,
    h: Any,
    x: Any,
    lora_a: Sequence[Any],
    slot_ranks: Sequence[Any],
    route: LoRARoute,
    *,
    whole: bool = False,
) -> tuple[Any, list[int]]:
    """Write the rank vectors of all slices to `h`, ``[parts, total_tokens, columns]``.

    Args:
        whole: Add the parts up.

    Returns:
        What of `h` is left to add up, and the first column of each slice.
    """
    if h.shape[2] == 0:
        return h, [0] * len(lora_a)
    in_dim, itemsize = x.shape[1], x.dtype.itemsize
    aligned = in_dim * itemsize % 16 == 0 and all(
        a.strides[2] == itemsize and checks.is_aligned(x, a) for a in lora_a
    )
    members: list[Any] = []
    columns: list[int] = []
    blocks = 0
    for a, ranks in zip(lora_a, slot_ranks, strict=True):
        columns.append(16 * blocks)
        width = min(16 * _blocks(a), h.shape[2])  # of a padded slice, or all of an unpadded h
        members += [
            a,
            signed(backend, ranks),
            a.shape[1],
            *_elements(a),
            blocks,
            16 * blocks,
            width,
        ]
        blocks += _blocks(a)
    few = tiles.sgmv_is_few(len(route.rows), blocks, len(h))
    tile = tiles.sgmv_shrink(x.dtype, blocks, route.item_rows, aligned, few)
    tile_rows, tile_blocks = tiles.sgmv_shrink_tile(tile)
    chunks, row_tiles = -(-blocks // tile_blocks), route.rows.size // tile_rows
    # Few rows: the launch of expand costs less than to wait for the last part.
    whole = len(h) > 1 and (whole or route.item_rows >= 64)
    counters = route.counters
    if whole and chunks > tiles.SGMV_COUNTERS:
        counters = backend.zeros((row_tiles, chunks), np.int32)
    groups, is_long = len(h), tile.source == "sgmv_shrink_long.cu"
    if is_long:  # a block has a group of parts
        full_blocks = -(-x.shape[0] // tile_rows) * chunks
        groups = tiles.sgmv_shrink_groups(full_blocks, len(h), backend.resident_blocks(tile))
    backend.launch(
        tile,
        (row_tiles * chunks * groups,),
        [
            x,
            _slices(members, len(lora_a)),
            route.rows,
            route.items,
            route.item_rows // tile_rows,
            h,
            counters if whole else None,
            x.shape[0],
            in_dim,
            len(lora_a),
            blocks,
            len(h),
            *([groups] if is_long else []),
            h.shape[2],
            counters.shape[1],
        ],
    )
    return h[:1] if whole else h, columns


def expand(
    backend: jit.Backend,
    h: Any,
    slices: Sequence[tuple[Any, int, Any, Any, Any]],
    route: LoRARoute,
    *,
    after_shrink: bool = True,
) -> None:
    """Add each slice's delta to its y.

    Args:
        h: ``[parts, total_tokens, columns]``.
        slices: y, its first column of h, B, the slots' ranks and the bias; all y have one dtype.
        after_shrink: `shrink`, or `expand` after it, is the launch before this one.
    """
    y, itemsize = slices[0][0], slices[0][2].dtype.itemsize
    members: list[Any] = []
    slice_blocks: list[int] = []
    aligned = h.shape[2] % 4 == 0 and checks.is_aligned(h)
    for target, column, b, ranks, bias in slices:
        slot_stride, stride, rank_stride = _elements(b)
        aligned = aligned and b.shape[1] % 8 == 0 and b.strides[1] == itemsize
        aligned = aligned and checks.is_aligned(target, b.transpose(0, 2, 1))
        aligned = aligned and target.strides[0] < 2**32
        members += [b, bias, signed(backend, ranks), target, b.shape[2], b.shape[1]]
        members += [slot_stride, rank_stride, stride, target.strides[0]]
        members += [sum(slice_blocks), column]
        slice_blocks.append(-(-b.shape[1] // tiles.SGMV_BLOCK_N))
    column_blocks = sum(slice_blocks)
    if column_blocks == 0:
        return
    rank = max(b.shape[2] for _, _, b, _, _ in slices)
    dtypes = slices[0][2].dtype, y.dtype
    tile = tiles.sgmv_expand(*dtypes, rank, route.item_rows, aligned, backend.shared_bytes)
    tile_rows = tiles.sgmv_expand_rows(tile)
    row_tiles = route.item_rows // tile_rows
    blocks = len(route.rows) * row_tiles * column_blocks
    is_long = tile.source == "sgmv_expand_long.cu"
    stays = is_long or route.item_rows < 64  # the grid: many items may have no rows
    resident = backend.resident_blocks(tile) if stays else blocks
    blocks = min(blocks, resident)
    if is_long:
        full_tiles = -(-h.shape[1] // tile_rows)
        run_units = tiles.sgmv_run_units(tuple(slice_blocks), full_tiles, resident)
        sizes = [len(slices), run_units, h.shape[2]]
    else:
        sizes = [h.shape[1], len(slices), column_blocks, len(h), h.shape[2]]
    slices_of = _slices(members, len(slices))
    args = [h, slices_of, route.rows, route.items, row_tiles, *sizes, after_shrink]
    backend.launch(tile, (blocks,), args)


def _elements(array: Any) -> list[int]:
    """Strides in elements."""
    return [stride // array.dtype.itemsize for stride in array.strides]


def _slices(members: list[Any], slices: int) -> jit.Struct:
    """Members of some slices, with room for the others that a launch may have."""
    return jit.Struct(members + [0] * (len(members) // slices * (tiles.SGMV_MAX_SLICES - slices)))
