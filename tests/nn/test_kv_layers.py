"""Layers over a cache of separate keys and values, `PagedKVCacheLayers`: as over the manager's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lorakit import DeviceRef, PagedKVCacheCollection, PagedKVCacheLayers, build_lora_batch
from lorakit.testing import assert_bitwise_equal
from tests.nn.helpers import Setup, claim, normal, offsets
from tests.nn.test_attention_lora import RANKS, with_adapters
from tests.nn.test_gpu_inputs import DlpackOnly


def as_it_is(array: Any) -> Any:
    return array


def hnd_memory(s: Setup, to_device: Callable[[Any], Any]) -> Any:
    """For one layer, with heads before slots, keys beside values: ``[pages, 2, heads, slots, dim]``."""
    pages, _, _, slots, heads, dim = s.manager.blocks.shape
    return to_device(np.full((pages, 2, heads, slots, dim), np.nan, s.dtype.to_numpy()))


def layer_1(collection: PagedKVCacheCollection, memory: Any, producer: Any) -> PagedKVCacheLayers:
    keys, values = (producer(memory[:, part].swapaxes(1, 2)) for part in (0, 1))
    return PagedKVCacheLayers(
        ["not looked at", keys],
        [None, values],
        collection.cache_lengths,
        collection.lookup_table,
        collection.max_lengths,
    )


@pytest.mark.parametrize("producer", [as_it_is, DlpackOnly])
def test_a_layer_gives_the_same_bits(
    producer: Any, device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    """Over prefill and decode, and the adapters' part alone; of arrays of other libraries too."""
    results = []
    for in_layers in (False, True):
        s = with_adapters(device)
        memory = hnd_memory(s, to_device)
        claim(s.manager, ["a", "b"])
        found = []
        for lengths in ((5, 4), (1, 1)):
            collection: Any = s.manager.fetch(["a", "b"], lengths)
            if in_layers:
                collection = layer_1(collection, memory, producer)
            x, rows = to_device(s.tokens(30, sum(lengths))), offsets(*lengths)
            s.layer.set_lora_batch_info(*build_lora_batch([2, 0], rows, RANKS))
            found.append(s.layer(1, x, collection, s.rope.freqs_cis, rows))
            found.append(s.layer.fused_qkv_lora(x, collection, rows, 1))
            s.manager.step(["a", "b"])
        results.append([to_host(array) for array in found])
        if in_layers:
            assert np.isnan(to_host(s.manager.blocks)).all()
            cache = to_host(memory).swapaxes(2, 3)
        else:
            cache = to_host(s.manager.blocks)[:, :, 1]
        results[-1].append(np.ascontiguousarray(cache))
    for expected, result in zip(*results, strict=True):
        assert_bitwise_equal(result, expected)
    assert np.isfinite(results[0][0]).all()


@pytest.mark.parametrize(
    ("layer_idx", "damage", "error", "words"),
    [
        (1, lambda v: v[:, :2], ValueError, r"values\[1\] must have shape \[num_pages, 3, 2, 16\]"),
        (1, lambda v: v[:9], ValueError, r"values\[1\] has num_pages = 9, but keys\[1\] has 70"),
        (1, lambda v: v.astype("f2"), TypeError, r"values\[1\] must be float32, got float16"),
        (1, lambda _: [0.0], TypeError, r"values\[1\] must be an array on .*, got builtins.list"),
        (
            1,
            lambda v: v.swapaxes(1, 3).copy().swapaxes(1, 3),
            ValueError,
            r"values\[1\] must be contiguous along head_dim",
        ),
        (2, lambda v: v, ValueError, r"layer_idx must be in \[0, 2\), got 2"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    layer_idx: int,
    damage: Callable[[Any], Any],
    error: type[Exception],
    words: str,
    device: DeviceRef,
    to_device: Any,
    to_host: Any,
) -> None:
    s = with_adapters(device)
    memory = hnd_memory(s, to_device)
    claim(s.manager, ["a"])
    collection = layer_1(s.manager.fetch(["a"], [5]), memory, as_it_is)
    collection.values = [None, damage(collection.values[1])]
    x = to_device(normal(1, 5, 40))
    with pytest.raises(error, match=words):
        s.layer(layer_idx, x, collection, s.rope.freqs_cis, offsets(5))
    assert np.isnan(to_host(memory)).all()
