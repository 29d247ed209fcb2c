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

# A head dim is padded to the next of these inside the attention kernel.
HEAD_DIMS = (16, 32, 64, 96, 128, 192, 256)

SGMV_BLOCK_M = 16  # rows of a block in both sgmv kernels
SGMV_EXPAND_BLOCK_N = 128  # columns of a block
KV_THREADS = 256
ROPE_THREADS = 256


@dataclass(frozen=True)
class Instance:
    """One instantiation of a kernel template.

    Attributes:
        source: File in ``cuda_src``.
        kernel: Name of the template.
        params: Its arguments as C++ text.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    source: str
    kernel: str
    params: tuple[str, ...]
    threads: int
    shared_bytes: int = 0

    @property
    def name(self) -> str:
        """The C++ name expression."""
        return f"lorakit::{self.kernel}<{', '.join(self.params)}>"


@functools.cache
def sgmv_shrink(dtype: Any, max_lora_rank: int, aligned: bool) -> Instance:
    """Ranks in one block, or in blocks of 64. `aligned`: rows of x and A are whole 16-byte vectors."""
    dtype = np.dtype(dtype)
    block_r = 16 if max_lora_rank <= 16 else 64
    stages, block_k = 2, 256 // dtype.itemsize
    return Instance(
        "sgmv.cu",
        "sgmv_shrink_kernel",
        (_CPP_NAMES[dtype], str(block_r), _flag(aligned)),
        threads=128,
        shared_bytes=stages * (SGMV_BLOCK_M + block_r) * _tile_row_bytes(block_k, dtype),
    )


def sgmv_shrink_block_r(instance: Instance) -> int:
    """Ranks of a block of a shrink instance."""
    return int(instance.params[1])


@functools.cache
def sgmv_expand(dtype: Any, out_dtype: Any, aligned: bool) -> Instance:
    """`aligned`: rows of B (rank-major) and of y are whole 16-byte vectors."""
    dtype = np.dtype(dtype)
    stages, block_r = 2, 16
    return Instance(
        "sgmv.cu",
        "sgmv_expand_kernel",
        (_CPP_NAMES[dtype], _CPP_NAMES[np.dtype(out_dtype)], _flag(aligned)),
        threads=128,
        shared_bytes=stages * block_r * _tile_row_bytes(SGMV_EXPAND_BLOCK_N, dtype),
    )


@functools.cache
def rope_ragged(dtype: Any, head_dim: int, rotary_dim: int, interleaved: bool) -> Instance:
    """As many pairs per thread as divide both the rotated part and the rest."""
    pairs = next(n for n in (8, 4, 1) if head_dim % (2 * n) == 0 and rotary_dim % (2 * n) == 0)
    return Instance(
        "rope.cu",
        "rope_ragged_kernel",
        (_CPP_NAMES[np.dtype(dtype)], str(pairs), _flag(interleaved)),
        threads=ROPE_THREADS,
    )


def rope_pairs(instance: Instance) -> int:
    """Pairs of a thread of a rope instance."""
    return int(instance.params[1])


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
def attention_ragged(dtype: Any, head_dim: int) -> Instance:
    """Tiles that fit in 99 KiB, the least of all supported GPUs, at every head dim."""
    dtype = np.dtype(dtype)
    padded = next(dim for dim in HEAD_DIMS if head_dim <= dim)
    warps = 2 if dtype.itemsize == 4 else 4
    block_n = (64 if padded <= 128 else 32) // (
        dtype.itemsize // 2
    )  # more keys would spill registers
    tiles = (16 * warps + 2 * block_n) * _tile_row_bytes(padded, dtype)
    return Instance(
        "attention.cu",
        "attention_ragged_kernel",
        (_CPP_NAMES[dtype], str(padded), str(warps), str(block_n)),
        threads=32 * warps,
        shared_bytes=tiles + 2 * block_n * 8,
    )


def attention_block_m(instance: Instance) -> int:
    """(token, head) rows of a block of an attention instance."""
    return 16 * int(instance.params[2])


def instances() -> tuple[Instance, ...]:
    """Every instance that a chooser can return."""
    flags = (True, False)
    outputs = sorted({(t, out) for t in STORAGE for out in (t, STORAGE[0])}, key=str)
    found = [
        *(sgmv_shrink(t, r, a) for t, r, a in itertools.product(STORAGE, (16, 64), flags)),
        *(sgmv_expand(t, out, a) for (t, out), a in itertools.product(outputs, flags)),
        *(rope_ragged(t, d, d, i) for t, d, i in itertools.product(STORAGE, (16, 8, 2), flags)),
        *(store_kv(t) for t in STORAGE),
        *(add_kv(t, delta) for t, delta in outputs),
        *(attention_ragged(t, d) for t, d in itertools.product(STORAGE, HEAD_DIMS)),
    ]
    return tuple(found)


def _tile_row_bytes(cols: int, dtype: np.dtype[Any]) -> int:
    """A row of common/tile.cuh's SharedTile: its columns and 16 bytes."""
    return cols * dtype.itemsize + 16


def _flag(value: bool) -> str:
    return "true" if value else "false"
