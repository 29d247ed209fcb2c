"""Hands out the pages of the cache to requests."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit import checks
from lorakit.nn.arrays import (
    Array,
    as_metadata,
    copy_into,
    current_device_of,
    integer,
    positive,
    upload,
    zeros,
)
from lorakit.nn.device import DeviceRef, single_device
from lorakit.nn.kv_cache import KVCacheParams, PagedKVCacheCollection


class OutOfPagesError(RuntimeError):
    """No pages left for a batch; nothing was changed. Release a request and try again.

    Attributes:
        needed: Pages the batch needs beyond those it has.
        free: Pages that are free.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"the batch needs {needed} more pages, but {free} are free")
        self.needed = needed
        self.free = free

    def __reduce__(self) -> tuple[type[OutOfPagesError], tuple[int, int]]:
        return type(self), (self.needed, self.free)


@dataclass
class _Request:
    length: int = 0  # tokens in the cache
    pending: int = 0  # tokens that the step after the last fetch adds
    pages: list[int] = field(default_factory=list)


class PagedKVCacheManager:
    """Allocates pages to requests and builds the arrays of each step (MAX `PagedKVCacheManager`).

    A request lives through ``claim``, then for each step ``fetch``, the layers, ``step``, and at
    the end ``release``. Freed pages are handed out again in the order in which they were freed.
    MAX's ``session`` argument is left out: there is no graph.

    Args:
        params: Geometry of the cache.
        max_batch_size: Requests that may be claimed at a time.
        max_seq_len: Longest sequence.
        num_layers: Layers that share the cache.
        devices: One device; None: the current GPU, else the CPU.
        cache_memory: Bytes for the cache; it gets as many whole pages as fit.
        page_size: Tokens in a page; must be `params.page_size`.
        enable_runtime_checks: Verify after each change that every page has exactly one owner.

    Attributes:
        blocks: ``[num_pages, 2, num_layers, page_size, n_kv_heads, head_dim]``, zeros at first.
        num_pages: Pages in the cache.

    Raises:
        RuntimeError: `cache_memory` holds no page.
        ValueError, TypeError: A size below 1, or `page_size` is not that of `params`.
        NotImplementedError: More than one device.
    """

    def __init__(
        self,
        params: KVCacheParams,
        max_batch_size: int,
        max_seq_len: int,
        num_layers: int,
        devices: Sequence[DeviceRef] | None,
        cache_memory: int,
        page_size: int = 128,
        enable_runtime_checks: bool = False,
    ) -> None:
        self.max_batch_size, self.max_seq_len, self.num_layers, self.page_size = positive(
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            num_layers=num_layers,
            page_size=page_size,
        )
        if params.page_size != self.page_size:
            raise ValueError(
                f"page_size must be params.page_size = {params.page_size}, got {page_size}"
            )
        self.params = params
        self.device = single_device(devices)
        self.enable_runtime_checks = enable_runtime_checks
        heads = (params.n_kv_heads_per_device, params.head_dim)
        page_shape = (2, self.num_layers, self.page_size, *heads)
        dtype = params.dtype.to_numpy()
        page_bytes = int(np.prod(page_shape, dtype=np.int64)) * dtype.itemsize
        self.num_pages = integer(cache_memory, "cache_memory") // page_bytes
        if self.num_pages < 1:
            raise RuntimeError(
                f"cache_memory must hold a page of {page_bytes} bytes, got {cache_memory}"
            )
        self._warn_if_small()
        self.blocks = zeros((self.num_pages, *page_shape), dtype, self.device)
        self._free = deque(range(self.num_pages))
        self._requests: dict[Hashable, _Request] = {}

    # ---- The life of a request ------------------------------------------------------------------

    def claim(self, request_id: Hashable) -> None:
        """Register a request, without pages (MAX ``external_claim``).

        Raises:
            ValueError: It is registered already, or ``max_batch_size`` requests are.
        """
        if request_id in self._requests:
            raise ValueError(f"request_id must not be claimed yet, got {request_id!r}")
        if len(self._requests) == self.max_batch_size:
            raise ValueError(
                f"request_id {request_id!r} must wait: max_batch_size = {self.max_batch_size} "
                "requests are claimed"
            )
        self._requests[request_id] = _Request()

    def contains(self, request_id: Hashable) -> bool:
        """True if the request is registered."""
        return request_id in self._requests

    def allocate(self, request_id: Hashable, num_tokens: int) -> None:
        """Give a request the pages for `num_tokens` more tokens than are cached; fetch does so too.

        Raises:
            OutOfPagesError: Nothing was changed.
            RuntimeError: The sequence would be longer than ``max_seq_len``.
            ValueError: The request is not claimed, or `num_tokens` is negative.
        """
        self._allocate([request_id], [self._tokens(num_tokens)])

    def fetch(
        self,
        request_ids: Sequence[Hashable],
        num_tokens: Sequence[int],
        num_steps: int = 1,
        out: PagedKVCacheCollection | None = None,
    ) -> PagedKVCacheCollection:
        """Allocate pages for a step of a batch, to all requests or none, and build its arrays.

        Args:
            request_ids: The batch, in order; each request at most once.
            num_tokens: New tokens of each.
            num_steps: Steps to allocate for; each after the first adds one token per request.
            out: The result of an earlier fetch with equally many requests and steps, whose arrays
                are rewritten in place and returned, so that a captured graph sees the new step.

        Returns:
            The cache for this step: ``lookup_table`` is ``[batch, ceil(max_seq_len / page_size)]``.

        Raises:
            OutOfPagesError: Too few free pages; nothing was changed.
            RuntimeError: A sequence would be longer than ``max_seq_len``; nothing was changed.
            ValueError: Lengths differ, a request twice or not claimed, or `out` does not fit.
        """
        (num_steps,) = positive(num_steps=num_steps)
        counts = [self._tokens(count) for count in num_tokens]
        if len(counts) != len(request_ids):
            raise ValueError(
                f"num_tokens must have one entry for each of {len(request_ids)} requests, "
                f"got {len(counts)}"
            )
        if out is not None:
            self._check_out(out, len(counts), num_steps)
        totals = [count + num_steps - 1 for count in counts]
        requests = self._allocate(request_ids, totals)
        for request, total in zip(requests, totals, strict=True):
            request.pending = total
        return self._collection(requests, counts, num_steps, out)

    def step(self, request_ids: Sequence[Hashable]) -> None:
        """Count the tokens of the last fetch as cached.

        Raises:
            ValueError: A request is not claimed; nothing was changed.
        """
        for request in self._find(request_ids):
            request.length += request.pending
            request.pending = 0

    def release(self, request_id: Hashable) -> None:
        """Forget a request and free its pages; `ValueError` if it is not claimed."""
        (request,) = self._find([request_id])
        self._free.extend(request.pages)
        del self._requests[request_id]
        self._check_owners()

    def increment_cache_lengths(
        self, collection: PagedKVCacheCollection, input_row_offsets: Array
    ) -> PagedKVCacheCollection:
        """The next step of a multi-step fetch: the tokens of this step count as cached.

        Args:
            collection: What the step used; it stays as it is. At least two rows of ``max_lengths``.
            input_row_offsets: ``[batch + 1]`` uint32 or int32, of the step that was run.

        Returns:
            The same blocks and lookup table with new ``cache_lengths`` and shorter ``max_lengths``.

        Raises:
            ValueError, TypeError: The offsets do not fit the collection, or no step is left.
        """
        offsets, host_offsets = as_metadata(
            input_row_offsets, self.device, "input_row_offsets", checks.OFFSET_DTYPES
        )
        lengths = collection.cache_lengths
        checks.check_shapes(
            cache_lengths=(lengths, "batch_size"), input_row_offsets=(offsets, "batch_size+1")
        )
        if host_offsets is not None:
            last = int(host_offsets[-1])
            checks.check_offsets("input_row_offsets", host_offsets, last, exact=True)
        if len(collection.max_lengths) < 2:
            raise ValueError("collection must have a step left, got the last one of its fetch")
        with current_device_of(lengths):
            new = (offsets[1:] - offsets[:-1]).astype(lengths.dtype)
            lengths = lengths + new
        return PagedKVCacheCollection(
            collection.blocks, lengths, collection.lookup_table, collection.max_lengths[1:]
        )

    # ---- Statistics -----------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Pages that no request has."""
        return len(self._free)

    @property
    def free_blocks_pct(self) -> float:
        """Share of the pages that are free, in [0, 1]."""
        return self.num_free_blocks / self.num_pages

    @property
    def used_blocks_pct(self) -> float:
        """Share of the pages that requests have, in [0, 1]."""
        return 1 - self.free_blocks_pct

    def get_req_blocks(self, request_id: Hashable) -> list[int]:
        """The pages of a request, in the order of its tokens; `ValueError` if it is not claimed."""
        (request,) = self._find([request_id])
        return list(request.pages)

    # ---- Inside ---------------------------------------------------------------------------------

    def _allocate(self, request_ids: Sequence[Hashable], counts: Sequence[int]) -> list[_Request]:
        requests = self._find(request_ids)
        wanted = []
        for request_id, request, count in zip(request_ids, requests, counts, strict=True):
            total = request.length + count
            if total > self.max_seq_len:
                raise RuntimeError(
                    f"request {request_id!r} would have {total} tokens, more than max_seq_len = "
                    f"{self.max_seq_len}"
                )
            wanted.append(max(0, -(-total // self.page_size) - len(request.pages)))
        if sum(wanted) > len(self._free):
            raise OutOfPagesError(sum(wanted), len(self._free))
        for request, pages in zip(requests, wanted, strict=True):
            request.pages += [self._free.popleft() for _ in range(pages)]
        self._check_owners()
        return requests

    def _collection(
        self,
        requests: Sequence[_Request],
        counts: Sequence[int],
        num_steps: int,
        out: PagedKVCacheCollection | None,
    ) -> PagedKVCacheCollection:
        lengths = np.array([request.length for request in requests], np.uint32)
        table = np.full(self._table_shape(len(requests)), self.num_pages, np.uint32)
        for row, request in zip(table, requests, strict=True):
            row[: len(request.pages)] = request.pages
        after = [request.length + n for request, n in zip(requests, counts, strict=True)]
        steps = np.ones((num_steps, 2), np.uint32)
        steps[0, 0] = max(counts, default=0)
        steps[:, 1] = max(after, default=0) + np.arange(num_steps)
        if out is None:
            return PagedKVCacheCollection(
                self.blocks, upload(lengths, self.device), upload(table, self.device), steps
            )
        copy_into(out.cache_lengths, lengths)
        copy_into(out.lookup_table, table)
        out.max_lengths[...] = steps
        return out

    def _check_out(self, out: PagedKVCacheCollection, batch: int, num_steps: int) -> None:
        if not isinstance(out, PagedKVCacheCollection) or out.blocks is not self.blocks:
            raise ValueError("out must be a collection that this manager fetched")
        width = self._table_shape(batch)[1]
        checks.check_shapes(
            **{
                "out.cache_lengths": (out.cache_lengths, f"{batch}"),
                "out.lookup_table": (out.lookup_table, f"{batch} {width}"),
                "out.max_lengths": (out.max_lengths, f"{num_steps} 2"),
            }
        )
        for name in ("cache_lengths", "lookup_table", "max_lengths"):
            checks.check_dtype((np.uint32,), **{f"out.{name}": getattr(out, name)})

    def _table_shape(self, batch: int) -> tuple[int, int]:
        return batch, -(-self.max_seq_len // self.page_size)

    def _find(self, request_ids: Sequence[Hashable]) -> list[_Request]:
        if len(set(request_ids)) != len(request_ids):
            raise ValueError(f"request_ids must name each request once, got {list(request_ids)!r}")
        for request_id in request_ids:
            if request_id not in self._requests:
                raise ValueError(f"request_id must be claimed, got {request_id!r}")
        return [self._requests[request_id] for request_id in request_ids]

    def _tokens(self, count: Any) -> int:
        tokens = integer(count, "num_tokens")
        if tokens < 0:
            raise ValueError(f"num_tokens must not be negative, got {tokens}")
        return tokens

    def _warn_if_small(self) -> None:
        full = self._table_shape(0)[1]
        for wanted, what in (
            (full, f"one sequence of max_seq_len = {self.max_seq_len}"),
            (self.max_batch_size, f"one page for each of max_batch_size = {self.max_batch_size}"),
        ):
            if self.num_pages < wanted:
                warnings.warn(
                    f"cache_memory holds {self.num_pages} pages, but {what} needs {wanted}",
                    stacklevel=3,
                )

    def _check_owners(self) -> None:
        """With `enable_runtime_checks`: every page is free, or in one place of one request."""
        if not self.enable_runtime_checks:
            return
        owned = [page for request in self._requests.values() for page in request.pages]
        if sorted([*owned, *self._free]) != list(range(self.num_pages)):
            raise RuntimeError(f"pages must have one owner each, got {sorted(owned)} in use")
