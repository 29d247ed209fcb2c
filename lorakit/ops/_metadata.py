"""Batch metadata as kernels take it: checked where the host can see it, then on the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorakit import checks, jit
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
) -> dict[str, int]:
    """Shapes, dtypes and layout of a paged cache and the arrays of this step; returns the sizes.

    The axes of the cache are ``num_pages num_layers page_size n_kv_heads head_dim``; `arrays` may name
    them too. Host-visible offsets and pages are checked by value.
    """
    if not hasattr(kv_collection, "lookup_table"):
        raise TypeError(
            f"kv_collection must be a PagedKVCacheCollection, got {type(kv_collection).__name__}"
        )
    if isinstance(batch_offset, bool) or not isinstance(batch_offset, (int, np.integer)):
        raise TypeError(f"batch_offset must be an integer, got {type(batch_offset).__name__}")
    sizes = checks.check_shapes(
        **arrays,
        blocks=(
            kv_collection.blocks,
            "num_pages 2 num_layers page_size n_kv_heads head_dim",
        ),
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
    check_metadata_place(kv_collection.blocks, **metadata)
    checks.check_contiguous(blocks=kv_collection.blocks)
    checks.check_layer_idx(layer_idx, sizes["num_layers"])
    checks.check_offsets(
        "input_row_offsets", input_row_offsets, rows, exact=True, start=batch_offset == 0
    )
    checks.check_pages(kv_collection, input_row_offsets, batch_offset=batch_offset)
    return sizes


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
