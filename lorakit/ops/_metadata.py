"""Batch metadata as kernels take it: checked where the host can see it, then on the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorakit import checks, jit
from lorakit.dtypes import STORAGE
from lorakit.jit import Backend


def check_segments(
    x: Any,
    lora_ids: Any,
    lora_ranks: Any,
    lora_grouped_offsets: Any,
    *,
    max_num_loras: int,
    slot_ranks: Any = None,
) -> None:
    """Shapes, dtypes and place of the LoRA batch info of x's rows, and values of what is on the host."""
    arrays = {"lora_ids": (lora_ids, "groups")}
    if lora_ranks is not None:
        arrays["lora_ranks"] = (lora_ranks, "groups")
    arrays["lora_grouped_offsets"] = (lora_grouped_offsets, "groups+1")
    checks.check_shapes(**arrays)
    checks.check_dtype((np.int32,), lora_ids=lora_ids)
    checks.check_dtype(checks.OFFSET_DTYPES, lora_grouped_offsets=lora_grouped_offsets)
    checks.check_vectors(lora_ids=lora_ids, lora_grouped_offsets=lora_grouped_offsets)
    checks.check_ids(lora_ids, max_num_loras)
    checks.check_offsets("lora_grouped_offsets", lora_grouped_offsets, x.shape[0], exact=False)
    if lora_ranks is not None:
        checks.check_dtype(checks.OFFSET_DTYPES, lora_ranks=lora_ranks)
        checks.check_vectors(lora_ranks=lora_ranks)
        checks.check_ranks("lora_ranks", lora_ranks)
    if slot_ranks is not None:
        checks.check_shapes(slot_ranks=(slot_ranks, f"{max_num_loras}"))
        checks.check_dtype((np.int32,), slot_ranks=slot_ranks)
        checks.check_vectors(slot_ranks=slot_ranks)
        checks.check_ranks("slot_ranks", slot_ranks)
    check_metadata_place(
        x,
        lora_ids=lora_ids,
        lora_ranks=lora_ranks,
        lora_grouped_offsets=lora_grouped_offsets,
        slot_ranks=slot_ranks,
    )


def check_cache(
    kv_collection: Any,
    input_row_offsets: Any,
    layer_idx: int,
    *,
    rows: int,
    batch_offset: int = 0,
    **arrays: tuple[Any, str],
) -> tuple[dict[str, int], dict[str, Any]]:
    """Shapes of a paged cache and the arrays of this step; dtype, place and layout of the cache.

    The axes of the cache are ``num_pages page_size n_kv_heads head_dim``; `arrays` may name them too.
    Host-visible offsets and pages are checked by value.

    Returns:
        The sizes, and the arrays that hold the layer by the names that messages give them.
    """
    if not hasattr(kv_collection, "lookup_table"):
        raise TypeError(
            "kv_collection must be a PagedKVCacheCollection or PagedKVCacheLayers, got "
            f"{type(kv_collection).__name__}"
        )
    if isinstance(batch_offset, bool) or not isinstance(batch_offset, (int, np.integer)):
        raise TypeError(f"batch_offset must be an integer, got {type(batch_offset).__name__}")
    named = checks.cache_arrays(kv_collection, layer_idx)
    sizes = checks.check_shapes(
        **arrays,
        **named,
        cache_lengths=(kv_collection.cache_lengths, "cached_sequences"),
        lookup_table=(kv_collection.lookup_table, "cached_sequences max_pages"),
        input_row_offsets=(input_row_offsets, "batch_size+1"),
    )
    whole = sizes["cached_sequences"] == sizes["batch_size"] and batch_offset == 0
    part = batch_offset > 0 and batch_offset + sizes["batch_size"] <= sizes["cached_sequences"]
    if not (whole or part):
        raise ValueError(
            f"input_row_offsets has {sizes['batch_size']} sequences from batch_offset = {batch_offset} "
            f"on, but cache_lengths has {sizes['cached_sequences']}"
        )
    cache = {name: array for name, (array, _) in named.items()}
    first = next(iter(cache.values()))
    checks.check_same_place(**cache)
    checks.check_dtype(STORAGE, **cache)
    checks.check_dtype((first.dtype,), **cache)
    checks.check_head_dim(sizes["head_dim"])
    if sizes["page_size"] < 1:
        raise ValueError(f"page_size must be at least 1, got {sizes['page_size']}")
    metadata = {
        "cache_lengths": kv_collection.cache_lengths,
        "lookup_table": kv_collection.lookup_table,
        "input_row_offsets": input_row_offsets,
    }
    checks.check_dtype(checks.OFFSET_DTYPES, **metadata)
    checks.check_vectors(**metadata)
    check_metadata_place(first, **metadata)
    if "blocks" in cache:
        checks.check_contiguous(**cache)
        checks.check_layer_idx(layer_idx, sizes["num_layers"])
    else:
        checks.check_cache_rows(**cache)
        checks.check_disjoint(" and ".join(cache), *cache.values())
    checks.check_offsets(
        "input_row_offsets", input_row_offsets, rows, exact=True, start=batch_offset == 0
    )
    checks.check_pages(
        kv_collection,
        input_row_offsets,
        num_pages=sizes["num_pages"],
        page_size=sizes["page_size"],
        batch_offset=batch_offset,
    )
    return sizes, cache


def check_metadata_place(arrays_of: Any, **metadata: Any) -> None:
    """Metadata is on the host, where it can be checked, or where the arrays are; else `TypeError`."""
    place = jit.place_of(arrays_of)
    for name, array in metadata.items():
        if array is not None and not jit.is_host(array):
            here = checks.place_of(name, array)
            if here != place:
                raise TypeError(f"{name} must be on the CPU or on {place}, got {here}")


def signed(backend: Backend, array: Any) -> Any:
    """On the device, as the kernels' int32; None stays None. uint32 beyond its range is a bad value."""
    return None if array is None else backend.asarray(array).view(np.int32)


def unsigned(backend: Backend, array: Any) -> Any:
    """On the device, as the kernels' uint32. A negative entry is beyond every valid one."""
    return backend.asarray(array).view(np.uint32)
