"""Which kernel instance runs, and with how many threads and how much shared memory.

A chooser takes sizes that the host knows from shapes, never data on the device, and returns an `Instance`.
`instances()` lists all that the choosers can return: it is also what the compile gate checks.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.dtypes import STORAGE, bfloat16

_CPP_NAMES = {
    np.dtype(np.float32): "float",
    np.dtype(np.float16): "__half",
    bfloat16: "__nv_bfloat16",
}

# A head dim is padded to the next of these inside the attention kernels.
HEAD_DIMS = (64, 128, 192, 256)
DECODE_ROW_BYTES = 512

SGMV_PART_K = 1024  # columns of in_dim that a block of shrink sums at a time
SGMV_BLOCK_N = 256  # columns of a block of expand
SGMV_MAX_SLICES = 3  # outputs of one launch
SGMV_FEW_BLOCKS = 640  # of shrink: a handful for each multiprocessor of a large GPU
SGMV_COUNTERS = 32  # of eight rows
SGMV_ROUTE_THREADS = 1024
# That a block may have on every GPU from sm_80 on: sm_86, sm_89 and sm_120 have no more.
LEAST_SHARED_BYTES = 99 * 1024
KV_THREADS = 256
ROPE_THREADS = 256
ROPE_STORE_THREADS = 128
ROPE_STORE_PASSES = 4  # kHeads in rope_store.cu
ROPE_STORE_FEW_TOKENS = 512  # with a pass of a block each, a wave or less of the largest GPUs


@dataclass(frozen=True)
class Instance:
    """One instantiation of a kernel template.

    Attributes:
        source: File in ``cuda_src``.
        kernel: Name of the template.
        params: Its arguments as C++ text.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
        early: From sm_90 on it may start while the kernel before it ends, and waits for that itself.
    """

    source: str
    kernel: str
    params: tuple[str, ...]
    threads: int
    shared_bytes: int = 0
    early: bool = False

    @property
    def name(self) -> str:
        """The C++ name expression."""
        params = f"<{', '.join(self.params)}>" if self.params else ""
        return f"lorakit::{self.kernel}{params}"


def sgmv_item_rows(total_tokens: int, max_adapters: int) -> int:
    """Rows of a work item, for as many adapters at most: few for decode, where each has a row or two."""
    if total_tokens < 128:
        return 8
    for rows, least in ((128, 4096), (64, 2048)):
        if total_tokens >= max(least, rows * max_adapters):
            return rows
    return 16


@functools.cache
def sgmv_route_items() -> Instance:
    """One block."""
    return Instance("sgmv_route.cu", "sgmv_route_items_kernel", (), SGMV_ROUTE_THREADS)


@functools.cache
def sgmv_route_rows() -> Instance:
    """A row per thread."""
    return Instance("sgmv_route.cu", "sgmv_route_rows_kernel", (), SGMV_ROUTE_THREADS)


@functools.cache
def sgmv_shrink(
    dtype: Any, rank_blocks: int, item_rows: int, aligned: bool, few: bool = False
) -> Instance:
    """As many rows of an item at once as pay.

    Args:
        rank_blocks: Blocks of 16 ranks, of all slices.
        aligned: Rows of x and A are whole 16-byte vectors.
        few: `sgmv_is_few`; each block may load more at a time.
    """
    dtype = np.dtype(dtype)
    fast = aligned and dtype.itemsize == 2
    if fast and item_rows >= 64:
        return _sgmv_shrink_long(dtype, rank_blocks, item_rows)
    rows = item_rows // 8 if fast else 1
    stages = 4 if rows == 1 or few else 2
    return Instance(
        "sgmv_shrink.cu",
        "sgmv_shrink_kernel",
        (_CPP_NAMES[dtype], str(rows), str(stages), _flag(aligned)),
        threads=128,
        shared_bytes=4 * stages * (16 + 8 * rows) * 128 + 8 * rows * 4,
        early=True,
    )


def _sgmv_shrink_long(dtype: np.dtype[Any], rank_blocks: int, item_rows: int) -> Instance:
    """All ranks, or up to 128 of them evenly: the fewer times x is read, the better."""
    ranks = -(-rank_blocks // -(-rank_blocks // 8))  # of a block, in blocks of 16
    rows = item_rows if ranks > 3 else 64  # more rows for few ranks would be too few blocks
    rank_warps = 1 if ranks <= 4 else 2
    ranks = -(-ranks // rank_warps)
    tile_rows = 16 * ranks * rank_warps + rows
    stages = 4 if tile_rows <= 192 else 3  # in 99 KiB
    blocks_bytes = -(-ranks * rank_warps * 20 // 16) * 16
    return Instance(
        "sgmv_shrink_long.cu",
        "sgmv_shrink_long_kernel",
        (_CPP_NAMES[dtype], str(ranks), str(rank_warps), str(rows // 64 * rank_warps)),
        threads=256,
        shared_bytes=stages * tile_rows * 128 + blocks_bytes + rows * 4 + 4,
        early=True,
    )


def sgmv_is_few(max_items: int, rank_blocks: int, parts: int) -> bool:
    """Whether all blocks of shrink, for an item and 16 ranks each, run at the same time."""
    return max_items * rank_blocks * parts <= SGMV_FEW_BLOCKS


def sgmv_shrink_groups(blocks: int, parts: int, resident: int) -> int:
    """Groups of parts of in_dim of a long shrink: as many as run at once, and of as many parts each.

    Of many parts each is a group: blocks that start when others end share the GPU more evenly.

    Args:
        blocks: Of the launch, for each group.
        resident: That run at once.
    """
    if parts > 8:
        return parts
    groups = min(max(resident // blocks, 1), parts)
    return -(-parts // -(-parts // groups))


def sgmv_shrink_tile(instance: Instance) -> tuple[int, int]:
    """Rows and blocks of 16 ranks of a block of a shrink instance."""
    if instance.source == "sgmv_shrink.cu":
        return 8 * int(instance.params[1]), 1
    ranks, rank_warps, row_blocks = map(int, instance.params[1:])
    return 64 * row_blocks // rank_warps, ranks * rank_warps


@functools.cache
def sgmv_expand(
    dtype: Any,
    out_dtype: Any,
    rank: int,
    item_rows: int,
    aligned: bool,
    shared_bytes: int = LEAST_SHARED_BYTES,
) -> Instance:
    """As many rows of an item at once as pay.

    Args:
        aligned: Rows of h, of B (rank-major) and of y are whole 16-byte vectors.
        shared_bytes: Shared memory that a block may have.
    """
    dtype, out_dtype = np.dtype(dtype), np.dtype(out_dtype)
    if item_rows >= 64 and rank > 16 and aligned and dtype.itemsize == 2:
        return _sgmv_expand_long(dtype, out_dtype, rank, item_rows, shared_bytes)
    rows = min(item_rows, 64)
    eights, ahead, steps = (8, 1, 1) if rows == 64 else (rows // 8, 2, 8)
    y_bytes = rows * 64 * out_dtype.itemsize
    b_bytes = ahead * 16 * 64 * dtype.itemsize
    return Instance(
        "sgmv_expand.cu",
        "sgmv_expand_kernel",
        (_CPP_NAMES[dtype], _CPP_NAMES[out_dtype], str(rows), _flag(aligned)),
        threads=128,
        shared_bytes=4 * (y_bytes + b_bytes) + eights * steps * 512 + 2 * rows * 4,
        early=True,
    )


def _sgmv_expand_long(
    dtype: np.dtype[Any], out_dtype: np.dtype[Any], rank: int, item_rows: int, shared_bytes: int
) -> Instance:
    """With room in shared memory two warps of 64 rows share B, and h of over 128 ranks is there at once."""

    def of(row_warps: int, steps: int) -> Instance:
        rows = 64 * row_warps
        y_bytes = rows * 256 * 2 if out_dtype.itemsize == 2 else 0
        return Instance(
            "sgmv_expand_long.cu",
            "sgmv_expand_long_kernel",
            (_CPP_NAMES[dtype], _CPP_NAMES[out_dtype], str(row_warps), str(steps)),
            threads=128 * row_warps,
            shared_bytes=y_bytes + 4 * 4 * 16 * 64 * 2 + rows // 8 * steps * 512 + rows * 16,
            early=True,
        )

    shapes = (
        [of(1, 8)] if item_rows == 64 else [of(2, 8 if rank <= 128 else 16), of(2, 8), of(1, 8)]
    )
    return next(shape for shape in shapes if shape.shared_bytes <= shared_bytes)


def sgmv_expand_rows(instance: Instance) -> int:
    """Rows of a block of an expand instance."""
    long = instance.source == "sgmv_expand_long.cu"
    return (64 if long else 1) * int(instance.params[2])


@functools.cache
def sgmv_run_units(slice_blocks: tuple[int, ...], row_tiles: int, resident: int) -> int:
    """Units of 256 columns that a block of a long expand takes of a slice at a time.

    The fewer, the more often h is read again, which takes as long as a unit and a half. The more, the less
    evenly `resident` blocks share them, and with more than 28 a row's columns are too far apart in time.
    """

    def time(units: int) -> float:
        runs = row_tiles * sum(-(-blocks // units) for blocks in slice_blocks)
        return -(-runs // resident) * (min(units, max(slice_blocks)) + 1.5)

    return min(range(1, 29), key=time)


@functools.cache
def rope_ragged(dtype: Any, head_dim: int, rotary_dim: int, interleaved: bool) -> Instance:
    """As many pairs per thread as divide both the rotated part and the rest."""
    params = _rope_params(dtype, head_dim, rotary_dim, interleaved)
    return Instance("rope.cu", "rope_ragged_kernel", params, ROPE_THREADS)


@functools.cache
def rope_store_kv(dtype: Any, head_dim: int, rotary_dim: int, interleaved: bool) -> Instance:
    """As many pairs per thread as `rope_ragged` takes."""
    params = _rope_params(dtype, head_dim, rotary_dim, interleaved)
    return Instance("rope_store.cu", "rope_store_kv_kernel", params, ROPE_STORE_THREADS)


def _rope_params(
    dtype: Any, head_dim: int, rotary_dim: int, interleaved: bool
) -> tuple[str, str, str]:
    pairs = next(n for n in (8, 4, 1) if head_dim % (2 * n) == 0 and rotary_dim % (2 * n) == 0)
    return _CPP_NAMES[np.dtype(dtype)], str(pairs), _flag(interleaved)


def rope_pairs(instance: Instance) -> int:
    """Pairs of a thread of a rope instance."""
    return int(instance.params[1])


@functools.cache
def rope_store_passes(total_tokens: int, heads: int, pass_heads: int) -> tuple[int, int]:
    """Passes of a block of rope_store_kv over heads of a token, and blocks of a token.

    Few tokens are spread over as many blocks as they can be; of many, a block takes as many heads as it
    can have on their way, and the blocks of a token as many each.

    Args:
        heads: Of queries, keys and values.
        pass_heads: Of one pass.
    """
    passes = -(-heads // pass_heads)
    if total_tokens <= ROPE_STORE_FEW_TOKENS:
        return 1, passes
    blocks = -(-passes // ROPE_STORE_PASSES)
    return -(-passes // blocks), blocks


@functools.cache
def store_kv(dtype: Any) -> Instance:
    """16 bytes of the cache per thread."""
    return Instance("kv_cache.cu", "store_kv_kernel", (_CPP_NAMES[np.dtype(dtype)],), KV_THREADS)


@functools.cache
def add_kv(dtype: Any, delta_dtype: Any) -> Instance:
    """16 bytes of the cache per thread."""
    params = (_CPP_NAMES[np.dtype(dtype)], _CPP_NAMES[np.dtype(delta_dtype)])
    return Instance("kv_cache.cu", "add_kv_kernel", params, KV_THREADS)


@functools.cache
def attention_decode(dtype: Any, head_dim: int, rows: int) -> Instance:
    """Two tiles on their way, in 99 KiB at every head dim.

    Args:
        rows: The most (token, head in group) pairs of a key head that a sequence has in this step.
    """
    dtype = np.dtype(dtype)
    padded = _decode_head_dim(dtype, head_dim)
    row_bytes = padded * dtype.itemsize
    warps = 4 if row_bytes <= 256 else 2
    row_tile = 16 if rows > 8 and dtype.itemsize == 2 and padded <= 128 else 8
    sizes = (2 * warps * 2 * 16 * row_bytes, row_tile * row_bytes, warps * row_tile * 8)
    return Instance(
        "attention_decode.cu",
        "attention_decode_kernel",
        (_CPP_NAMES[dtype], str(padded), str(row_tile)),
        threads=32 * warps,
        shared_bytes=sum(sizes) + -(-(warps + 2) * 8 // 16) * 16,
        early=True,
    )


def attention_decodes(dtype: Any, head_dim: int) -> bool:
    """Whether few rows have the decode kernel; of longer heads it only clears rows of no sequence."""
    return bool(head_dim * np.dtype(dtype).itemsize <= DECODE_ROW_BYTES)


def _decode_head_dim(dtype: np.dtype[Any], head_dim: int) -> int:
    dims = [dim for dim in HEAD_DIMS if dim * dtype.itemsize <= DECODE_ROW_BYTES]
    return next((dim for dim in dims if head_dim <= dim), dims[-1])


def attention_decode_rows(instance: Instance) -> int:
    """Rows of a tile of a decode instance."""
    return int(instance.params[2])


def attention_decode_keys(instance: Instance) -> int:
    """Keys of a tile of a decode instance."""
    return instance.threads // 2


@functools.cache
def attention_merge(dtype: Any, head_dim: int) -> Instance:
    """Two elements of two rows per thread."""
    padded = _decode_head_dim(np.dtype(dtype), head_dim)
    return Instance(
        "attention_merge.cu",
        "attention_merge_kernel",
        (_CPP_NAMES[np.dtype(dtype)], str(padded)),
        threads=256,
        early=True,
    )


def attention_pair_floats(instance: Instance) -> int:
    """Of the state of two rows of a merge instance: their values, largest scores and sums."""
    return 2 * int(instance.params[1]) + 4


@functools.cache
def attention_ragged(dtype: Any, head_dim: int) -> Instance:
    """As many rows and keys as registers and 99 KiB, the least of all supported GPUs, have room for."""
    dtype = np.dtype(dtype)
    padded = next(dim for dim in HEAD_DIMS if head_dim <= dim)
    row_bytes = padded * dtype.itemsize
    warps = 4 if row_bytes <= 512 else 2
    row_tiles = 2 if dtype.itemsize == 2 and padded <= 128 else 1
    block_n = 8 * warps
    tiles = (16 * row_tiles * warps + 4 * block_n) * row_bytes + 4 * 128
    return Instance(
        "attention.cu",
        "attention_ragged_kernel",
        (_CPP_NAMES[dtype], str(padded), str(warps), str(row_tiles)),
        threads=32 * warps,
        shared_bytes=tiles + 8 * (8 * block_n + 4) + 40,
    )


def attention_block_m(instance: Instance) -> int:
    """(token, head) rows of a block of an attention instance."""
    warps, row_tiles = map(int, instance.params[2:])
    return 16 * warps * row_tiles


def instances() -> tuple[Instance, ...]:
    """Every instance that a chooser can return."""
    flags = (True, False)
    outputs = sorted({(t, out) for t in STORAGE for out in (t, STORAGE[0])}, key=str)
    item_rows = (8, 16, 64, 128)
    shared_bytes = (LEAST_SHARED_BYTES, 2**20)
    sgmv = [
        *(
            sgmv_shrink(*g)
            for g in itertools.product(STORAGE, range(1, 9), item_rows, flags, flags)
        ),
        *(
            sgmv_expand(*out, *g)
            for out, *g in itertools.product(outputs, (16, 17, 129), item_rows, flags, shared_bytes)
        ),
    ]
    found = [
        sgmv_route_items(),
        sgmv_route_rows(),
        *dict.fromkeys(sgmv),  # each once
        *(rope_ragged(t, d, d, i) for t, d, i in itertools.product(STORAGE, (16, 8, 2), flags)),
        *(rope_store_kv(t, d, d, i) for t, d, i in itertools.product(STORAGE, (16, 8, 2), flags)),
        *(store_kv(t) for t in STORAGE),
        *(add_kv(t, delta) for t, delta in outputs),
        *(attention_ragged(t, d) for t, d in itertools.product(STORAGE, HEAD_DIMS)),
        *dict.fromkeys(
            attention_decode(*g) for g in itertools.product(STORAGE, HEAD_DIMS, (8, 16))
        ),
        *dict.fromkeys(attention_merge(*g) for g in itertools.product(STORAGE, HEAD_DIMS)),
    ]
    return tuple(found)


def _tile_row_bytes(cols: int, dtype: np.dtype[Any]) -> int:
    """A row of common/tile.cuh's SharedTile: its columns and 16 bytes."""
    return cols * dtype.itemsize + 16


def _flag(value: bool) -> str:
    return "true" if value else "false"
