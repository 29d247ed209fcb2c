"""A whole attention layer in a CUDA graph: metadata rewritten in place, then replayed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit import DeviceRef, build_lora_batch, ops
from lorakit.testing import assert_bitwise_equal
from tests.nn.helpers import STORAGE, normal, offsets, setup

BATCHES = (((4, 3), (0, None)), ((1, 6), (1, 0)), ((7, 0), (None, 1)))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("options", [{}, {"stacked_qkv": True, "clip_qkv": 0.1, "has_bias": True}])
@pytest.mark.parametrize("shared", [False, True])
def test_replay_of_the_layer(gpu: Any, dtype: Any, options: dict[str, Any], shared: bool) -> None:
    s = setup(DeviceRef.GPU(), dtype, max_num_loras=2, max_lora_rank=8, **options)
    for slot, rank in enumerate((8, 3)):
        s.put(slot, s.adapter(100 * (slot + 1), rank))
    s.manager.claim("a")
    s.manager.claim("b")
    x = gpu.asarray(normal(1, 7, 40, dtype=dtype))
    rows = gpu.zeros(3, np.uint32)
    step = s.manager.fetch(["a", "b"], [7, 7])
    info = [gpu.zeros(n, t) for n, t in ((2, np.int32), (2, np.uint32), (3, np.uint32))]
    s.layer.set_lora_batch_info(*info)

    def rewrite(lengths: tuple[int, int], adapters: Any) -> None:
        rows[...] = gpu.asarray(offsets(*lengths))
        batch = build_lora_batch(adapters, offsets(*lengths), [8, 3], num_groups=2)
        for array, values in zip(info, batch, strict=True):
            array[...] = gpu.asarray(values)
        s.manager.fetch(["a", "b"], lengths, out=step)

    def call() -> Any:
        if shared:
            route = ops.sgmv_route(x, *info, max_num_loras=2)
            s.layer.set_lora_batch_info(*info, route=route)
        return s.layer(1, x, step, s.rope.freqs_cis, rows)

    rewrite(*BATCHES[0])
    call()  # compiles
    step.max_lengths[0] = (7, 21)  # of any replay
    with lorakit.Graph() as graph:
        y = call()
    results = []
    for lengths, adapters in BATCHES:
        rewrite(lengths, adapters)
        before = s.manager.blocks.copy()
        expected, cache = call().get(), s.manager.blocks.get()
        s.manager.blocks[...] = before
        y.fill(np.nan)
        graph.replay()
        assert_bitwise_equal(y.get(), expected)
        assert_bitwise_equal(s.manager.blocks.get(), cache)
        s.manager.step(["a", "b"])  # the next batch decodes on top
        assert np.isfinite(expected).all()
        results.append(expected)
    assert all((results[i] != results[i + 1]).any() for i in range(2))
    lorakit.check_errors()
