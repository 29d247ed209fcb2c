"""The paged key and value cache: its parameters and its four arrays."""

from __future__ import annotations

import enum
from dataclasses import dataclass

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
        """True, as in MAX: layers take a `PagedKVCacheCollection`."""
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
            tokens after the step. Kept for MAX's callers; lorakit does not read it.
    """

    blocks: Array
    cache_lengths: Array
    lookup_table: Array
    max_lengths: NDArray[np.uint32]
