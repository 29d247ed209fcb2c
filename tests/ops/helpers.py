"""What the kernel tests share: named cases, arrays in hostile memory layouts, a record of launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.dtypes import STORAGE, bfloat16
from lorakit.testing import PagedCache, paged_cache, row_offsets
from lorakit.tiles import Instance

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

SANITIZED: set[Instance] = set()
"""Instances that the tests marked `sanitize` launch."""

C = TypeVar("C")
each_dtype = pytest.mark.parametrize("dtype", STORAGE, ids=str)
FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)


# ---- Cases -------------------------------------------------------------------------------------------


def parameters(
    cases: Iterable[Any], instances: Callable[[Any], set[Instance]], *names: str
) -> pytest.MarkDecorator:
    """Parametrizes a test with each case in each of its dtypes.

    The first case to launch an instance carries the mark `sanitize`: so the marked ones cover all
    instances, each as few times as it goes.

    Args:
        cases: Each has ``name``, ``dtypes``, ``dtype`` and ``gpu_only``.
        instances: Which instances a test of a case launches.
        names: Only the cases of these names; none: all.
    """
    found = []
    seen: set[Instance] = set()
    for case in cases:
        for dtype in case.dtypes:
            if names and case.name not in names:
                continue
            one = replace(case, dtype=dtype)
            new = set() if case.gpu_only else instances(one) - seen
            seen |= new
            marks = [pytest.mark.sanitize] if new else []
            found.append(pytest.param(one, id=f"{case.name}-{dtype}", marks=marks))
    SANITIZED.update(seen)
    return pytest.mark.parametrize("case", found)


def skip_where_slow(case: Any, kernels: KernelDevice) -> None:
    if case.gpu_only and kernels.is_slow:
        pytest.skip("needs a GPU: too large for the emulator")


@contextlib.contextmanager
def launches(kernels: KernelDevice) -> Iterator[set[Instance]]:
    """The instances that are launched meanwhile."""
    backend = kernels.backend
    seen: set[Instance] = set()
    launch = backend.launch

    def record(instance: Instance, grid: Sequence[int], args: Sequence[Any]) -> None:
        seen.add(instance)
        launch(instance, grid, args)

    backend.launch = record
    try:
        yield seen
    finally:
        del backend.launch


def split_error(dtype: Any) -> float:
    """What two terms of a 16-bit dtype lose of a float32 number, relative; float32 is its own term."""
    return {FLOAT32: 0.0, FLOAT16: 2.0**-23, bfloat16: 2.0**-17}[np.dtype(dtype)]


# ---- Memory layouts ----------------------------------------------------------------------------------


def shifted(kernels: KernelDevice, array: NDArray[Any], elements: int = 1) -> Any:
    """On the device, contiguous, but starting `elements` past a 16-byte boundary; NaN around it."""
    edge = np.full(elements, np.nan, array.dtype)
    flat = kernels.asarray(np.concatenate([edge, array.reshape(-1), edge]))
    return flat[elements : elements + array.size].reshape(array.shape)


def side_by_side(kernels: KernelDevice, *parts: NDArray[Any]) -> tuple[Any, ...]:
    """On the device as slices of one array ``[rows, all columns]``, as a fused projection returns them."""
    rows = len(parts[0])
    whole = kernels.asarray(np.concatenate([part.reshape(rows, -1) for part in parts], axis=1))
    ends = np.cumsum([part[0].size if rows else 0 for part in parts])
    return tuple(
        whole[:, end - part[0].size : end].reshape(part.shape) if rows else kernels.asarray(part)
        for part, end in zip(parts, ends, strict=True)
    )


# ---- The paged cache ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheCase:
    """A ragged batch over a paged cache."""

    name: str
    cached: tuple[int, ...]
    """Tokens of each sequence from before this step."""
    new: tuple[int, ...]
    """Tokens of each sequence in this step."""
    page_size: int = 16
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    num_layers: int = 2
    layer_idx: int = 1
    shared_pages: int = 0
    """Every sequence begins with the same so many pages."""
    strided: bool = False
    """Whether q, k and v are slices of one fused projection."""
    metadata: Any = np.uint32
    host_metadata: bool = False
    dtypes: tuple[Any, ...] = STORAGE
    dtype: Any = field(default=None, kw_only=True)
    gpu_only: bool = False

    @property
    def total_tokens(self) -> int:
        return sum(self.new)

    def offsets(self) -> NDArray[Any]:
        return row_offsets(self.new).astype(self.metadata)

    def cache(self, rng: np.random.Generator, **options: Any) -> PagedCache:
        """On the host. The other layers and everything unused hold NaN."""
        cache = paged_cache(
            self.cached,
            self.new,
            page_size=self.page_size,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            rng=rng,
            num_layers=self.num_layers,
            layer_idx=self.layer_idx,
            **options,
        )
        if self.shared_pages:
            assert min(self.cached) >= self.shared_pages * self.page_size
            cache.lookup_table[:, : self.shared_pages] = cache.lookup_table[0, : self.shared_pages]
        return replace(
            cache,
            cache_lengths=cache.cache_lengths.astype(self.metadata),
            lookup_table=cache.lookup_table.astype(self.metadata),
        )

    def rows(self, rng: np.random.Generator, heads: int, dtype: Any = None) -> NDArray[Any]:
        """``[total_tokens, heads, head_dim]`` normal values."""
        values = rng.standard_normal((self.total_tokens, heads, self.head_dim))
        return values.astype(self.dtype if dtype is None else dtype)

    def place(self, kernels: KernelDevice, cache: PagedCache) -> tuple[Any, Any]:
        """``(input_row_offsets, kv_collection)`` on the device, or the metadata on the host."""
        on_device = kernels.cache(cache)
        if not self.host_metadata:
            return kernels.asarray(self.offsets()), on_device
        return self.offsets(), replace(
            on_device, cache_lengths=cache.cache_lengths, lookup_table=cache.lookup_table
        )


def step_slots(case: CacheCase, cache: PagedCache, part: int) -> NDArray[np.bool_]:
    """Mask of ``blocks``: the slots of this step's keys (0) or values (1), by arithmetic of its own."""
    mask = np.zeros(cache.blocks.shape, np.bool_)
    for b, (cached, new) in enumerate(zip(case.cached, case.new, strict=True)):
        for position in range(cached, cached + new):
            page, slot = divmod(position, case.page_size)
            mask[cache.lookup_table[b, page], part, case.layer_idx, slot] = True
    return mask
