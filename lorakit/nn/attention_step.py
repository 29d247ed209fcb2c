"""The checks of one attention call, all before its first write."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorakit import checks
from lorakit.nn.arrays import Array, HostInteger, as_array, as_metadata, integer
from lorakit.nn.kv_cache import KVCollection, PagedKVCacheCollection, PagedKVCacheLayers

if TYPE_CHECKING:
    from lorakit.nn.attention import AttentionWithRope


class AttentionStep(NamedTuple):
    """The arguments of one call, checked and on the layer's device.

    Attributes:
        layer_idx: Layer of the cache.
        x: ``[total_tokens, hidden_size]``.
        kv: The cache, with metadata on the device.
        input_row_offsets: ``[batch_size + 1]`` on the device.
        host_kv: The cache with the host's copies of metadata where there are any.
        host_offsets: The host's copy of the offsets, or those of the device.
    """

    layer_idx: int
    x: Array
    kv: KVCollection
    input_row_offsets: Array
    host_kv: KVCollection
    host_offsets: Array

    @classmethod
    def checked(
        cls,
        layer: AttentionWithRope,
        layer_idx: HostInteger,
        x: Array,
        kv_collection: KVCollection,
        input_row_offsets: Array,
    ) -> AttentionStep:
        """Check everything but the rotary table, as `AttentionWithRope.__call__` says."""
        if not isinstance(kv_collection, (PagedKVCacheCollection, PagedKVCacheLayers)):
            raise TypeError(
                "kv_collection must be a PagedKVCacheCollection or PagedKVCacheLayers, got "
                f"{type(kv_collection).__name__}"
            )
        device, params = layer.devices[0], layer.kv_params
        dtype = layer.dtype.to_numpy()
        x = as_array(x, device, "x", dtype)
        index = integer(layer_idx, "layer_idx")
        page = f"{params.page_size} {params.n_kv_heads} {params.head_dim}"
        cache = {
            name: (as_array(array, device, name, dtype), axes)
            for name, (array, axes) in checks.cache_arrays(kv_collection, index, page).items()
        }
        metadata = {
            "input_row_offsets": input_row_offsets,
            "cache_lengths": kv_collection.cache_lengths,
            "lookup_table": kv_collection.lookup_table,
        }
        here: dict[str, Array] = {}
        host: dict[str, Array] = {}
        for name, value in metadata.items():
            here[name], copy = as_metadata(value, device, name, checks.OFFSET_DTYPES)
            host[name] = here[name] if copy is None else copy
        sizes = checks.check_shapes(
            x=(x, f"total_tokens {layer.hidden_size}"),
            **cache,
            input_row_offsets=(here["input_row_offsets"], "batch_size+1"),
            cache_lengths=(here["cache_lengths"], "batch_size"),
            lookup_table=(here["lookup_table"], "batch_size max_pages"),
        )
        checks.check_vectors(x=x)

        offsets = host["input_row_offsets"]
        checks.check_offsets("input_row_offsets", offsets, sizes["total_tokens"], exact=True)
        arrays = [array for array, _ in cache.values()]
        kv, host_kv = (
            replace(
                _with_layer(kv_collection, index, *arrays),
                cache_lengths=metadata["cache_lengths"],
                lookup_table=metadata["lookup_table"],
            )
            for metadata in (here, host)
        )
        checks.check_pages(
            host_kv, offsets, num_pages=sizes["num_pages"], page_size=arrays[0].shape[-3]
        )
        # Strides, and the range of the index if all layers are in one array: by the first op.
        return cls(index, x, kv, here["input_row_offsets"], host_kv, offsets)

    def checked_table(self, freqs_cis: Array, layer: AttentionWithRope) -> Array:
        """The rotary table, with a row for each position and no more columns than a head."""
        head_dim = layer.kv_params.head_dim
        table = as_array(freqs_cis, layer.devices[0], "freqs_cis", np.dtype(np.float32))
        rotary_dim = checks.check_shapes(freqs_cis=(table, "positions rotary_dim"))["rotary_dim"]
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(
                f"freqs_cis must have an even number of columns, at most head_dim = {head_dim}, "
                f"got {rotary_dim}"
            )
        checks.check_contiguous(freqs_cis=table)
        checks.check_positions(table, self.host_kv, self.host_offsets)
        return table


def _with_layer(kv_collection: KVCollection, layer_idx: int, *arrays: Array) -> KVCollection:
    """The same cache with other array objects for a layer: ``blocks``, or its keys and values."""
    if isinstance(kv_collection, PagedKVCacheCollection):
        return replace(kv_collection, blocks=arrays[0])
    keys, values = list(kv_collection.keys), list(kv_collection.values)
    keys[layer_idx], values[layer_idx] = arrays
    return replace(kv_collection, keys=keys, values=values)
