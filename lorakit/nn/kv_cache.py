"""The paged key and value cache: its parameters, and its arrays in either of two forms."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lorakit import checks
from lorakit.nn.arrays import Array, positive, storage_dtype
from lorakit.nn.dtype import DType


class KVCacheStrategy(enum.Enum):
    """How keys and values are kept (MAX `KVCacheStrategy`); only paging exists."""

    MODEL_DEFAULT = "model_default"
    PAGED = "paged"

    def uses_opaque(self) -> bool:
        """True, as in MAX: layers take a collection of the cache's arrays."""
        return True

    def kernel_substring(self) -> str:
        """The value."""
        return self.value


@dataclass(frozen=True)
class KVCacheParams:
    """Geometry of the cache (MAX `KVCacheParams`).

    Attributes:
        dtype: float32, float16 or bfloat16.
        n_kv_heads: Key and value heads.
        head_dim: Elements of a head.
        enable_prefix_caching: Not implemented.
        enable_kvcache_swapping_to_host: Not implemented.
        host_kvcache_swap_space_gb: Not implemented.
        cache_strategy: `KVCacheStrategy.PAGED`.
        page_size: Tokens in a page, at least 1; required with paging.
        n_devices: 1.
        data_parallel_degree: 1.

    Raises:
        ValueError, TypeError: A size below 1, another dtype, no `page_size`.
        NotImplementedError: What is not implemented.
    """

    dtype: DType
    n_kv_heads: int
    head_dim: int
    enable_prefix_caching: bool = False
    enable_kvcache_swapping_to_host: bool = False
    host_kvcache_swap_space_gb: float | None = None
    cache_strategy: KVCacheStrategy = KVCacheStrategy.PAGED
    page_size: int | None = None
    n_devices: int = 1
    data_parallel_degree: int = 1

    def __post_init__(self) -> None:
        for name, default in (
            ("enable_prefix_caching", False),
            ("enable_kvcache_swapping_to_host", False),
            ("host_kvcache_swap_space_gb", None),
            ("n_devices", 1),
            ("data_parallel_degree", 1),
        ):
            if getattr(self, name) != default:
                raise NotImplementedError(
                    f"{name} must be {default}, as others are not implemented, "
                    f"got {getattr(self, name)!r}"
                )
        if not isinstance(self.cache_strategy, KVCacheStrategy):
            raise TypeError(
                f"cache_strategy must be a lorakit.KVCacheStrategy, got {self.cache_strategy!r}"
            )
        storage_dtype(self.dtype)
        positive(n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)
        checks.check_head_dim(self.head_dim)
        if self.page_size is not None:
            positive(page_size=self.page_size)
        elif self.cache_strategy is KVCacheStrategy.PAGED:
            raise ValueError("page_size must be given with KVCacheStrategy.PAGED, got None")

    @property
    def n_kv_heads_per_device(self) -> int:
        """All heads, as there is one device."""
        return self.n_kv_heads

    @property
    def dtype_shorthand(self) -> str:
        """``f32``, ``f16`` or ``bf16``."""
        return {DType.float32: "f32", DType.float16: "f16", DType.bfloat16: "bf16"}[self.dtype]


@dataclass
class PagedKVCacheCollection:
    """The cache as one step sees it. Sequence ``b``, layer ``l``, token ``t`` of the sequence::

        page = lookup_table[b, t // page_size]
        key = blocks[page, 0, l, t % page_size]
        value = blocks[page, 1, l, t % page_size]

    Attributes:
        blocks: ``[num_pages, 2, num_layers, page_size, n_kv_heads, head_dim]``; written in place.
        cache_lengths: ``[batch_size]`` uint32 or int32, tokens cached *before* this step.
        lookup_table: ``[batch_size, max_pages]`` uint32 or int32, (sequence, page of the sequence)
            -> page. Entries past a sequence's length are never read; the manager puts ``num_pages``
            there.
        max_lengths: ``[num_steps, 2]`` uint32 on the host: most new tokens of any sequence, most
            tokens after the step. Attention reads the first, a bound on the new tokens.
    """

    blocks: Array
    cache_lengths: Array
    lookup_table: Array
    max_lengths: NDArray[np.uint32]

    def layer(self, layer_idx: int) -> tuple[Array, Array]:
        """Keys and values of a layer, views ``[num_pages, page_size, n_kv_heads, head_dim]``."""
        return self.blocks[:, 0, layer_idx], self.blocks[:, 1, layer_idx]


@dataclass
class PagedKVCacheLayers:
    """As `PagedKVCacheCollection`, but with arrays of keys and of values for each layer, in any layout.

    It goes wherever a `PagedKVCacheCollection` does. Sequence ``b``, layer ``l``, token ``t``::

        page = lookup_table[b, t // page_size]
        key = keys[l][page, t % page_size]
        value = values[l][page, t % page_size]

    So that the cache of another library is used as it is, in place, these may be views with any
    strides, and with others for keys than for values::

        kv[0], kv[1]                          # kv [2, pages, page_size, heads, head_dim] (vLLM)
        kv[:, 0], kv[:, 1]                    # kv [pages, 2, page_size, heads, head_dim] (NHD)
        k.swapaxes(1, 2), v.swapaxes(1, 2)    # k, v [pages, heads, page_size, head_dim] (HND)

    The ``head_dim`` elements of a row lie together and start at a multiple of 16 bytes. No two rows
    overlap, and all strides are positive: along one axis rows lie further apart than all those of
    the axes within it reach. Ops refuse other arrays, and keys that overlap values (`ValueError`).
    That layers do not overlap each other is the caller's part.

    Attributes:
        keys: For each layer ``[num_pages, page_size, n_kv_heads, head_dim]``, float32, float16 or
            bfloat16; written in place.
        values: For each layer an array of the shape and dtype of its keys; written in place.
        cache_lengths: ``[batch_size]`` uint32 or int32, tokens cached *before* this step.
        lookup_table: ``[batch_size, max_pages]`` uint32 or int32, (sequence, page of the sequence)
            -> page; C-contiguous. Entries past a sequence's length are never read.
        max_lengths: ``[num_steps, 2]`` uint32 on the host: most new tokens of any sequence, most
            tokens after the step. Attention reads the first, a bound on the new tokens.
    """

    keys: Sequence[Array]
    values: Sequence[Array]
    cache_lengths: Array
    lookup_table: Array
    max_lengths: NDArray[np.uint32]

    def layer(self, layer_idx: int) -> tuple[Array, Array]:
        """Keys and values of a layer."""
        return self.keys[layer_idx], self.values[layer_idx]


# What layers and ops take.
KVCollection: TypeAlias = "PagedKVCacheCollection | PagedKVCacheLayers"
