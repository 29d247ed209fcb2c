"""Capture and replay: metadata rewritten in place, the same arrays, the same graph.

The eager op on the same arrays is the expected result, bit for bit; other tests show that it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lorakit
from lorakit import ops
from lorakit.dtypes import bfloat16
from lorakit.nn import PagedKVCacheCollection
from lorakit.testing import activations, adapters, assert_bitwise_equal, rotary_table, row_offsets
from tests.ops.helpers import each_dtype

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

ROWS, PAGE_SIZE, MAX_PAGES = 24, 8, 12
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


@dataclass(frozen=True)
class Batch:
    """What is rewritten between replays: 4 sequences of at most 24 rows, 5 groups."""

    new: tuple[int, int, int, int]
    cached: tuple[int, int, int, int]
    groups: tuple[tuple[int, int], ...]


BATCHES = {
    "even": Batch((6, 6, 6, 6), (0, 3, 17, 40), ((0, 6), (1, 6), (-1, 6), (2, 3), (0, 3))),
    "ragged": Batch((1, 20, 0, 3), (70, 0, 5, 9), ((2, 1), (-1, 19), (0, 1), (1, 0), (2, 3))),
    "few tokens": Batch((2, 0, 1, 1), (50, 8, 0, 7), ((1, 2), (-1, 1), (0, 1), (0, 0), (0, 0))),
    "no tokens": Batch((0, 0, 0, 0), (0, 0, 9, 1), ((0, 0),) * 5),
    "all base": Batch((0, 0, 24, 0), (1, 2, 3, 4), ((-1, 20), (-1, 1), (-1, 1), (-1, 1), (-1, 1))),
    "even again": Batch((6, 6, 6, 6), (0, 3, 17, 40), ((0, 6), (1, 6), (-1, 6), (2, 3), (0, 3))),
}


class Step:
    """All arrays of a step on the GPU, and the ops on them."""

    def __init__(self, gpu: Any, dtype: Any, rng: np.random.Generator) -> None:
        self.gpu, self.rng = gpu, np.random.default_rng(7)
        width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        pages = 4 * MAX_PAGES + 3
        shape = (pages, 2, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM)
        self.start = gpu.asarray(activations(shape, dtype, rng))
        self.blocks = self.start.copy()
        self.x = gpu.asarray(activations((ROWS, width), dtype, rng))
        self.q = self.x.reshape(ROWS, HEADS, HEAD_DIM)
        self.kv = gpu.asarray(activations((ROWS, KV_HEADS, HEAD_DIM), dtype, rng))
        self.table = gpu.asarray(rotary_table(MAX_PAGES * PAGE_SIZE, HEAD_DIM))
        modules = [adapters(3, 17, width, n, dtype, rng) for n in (width, kv_width, kv_width)]
        self.lora_a = [gpu.asarray(module.lora_a) for module in modules]
        self.lora_b = [
            gpu.asarray(np.ascontiguousarray(module.lora_b.transpose(0, 2, 1))).transpose(0, 2, 1)
            for module in modules
        ]
        self.slot_ranks = [gpu.asarray(module.slot_ranks) for module in modules]

        self.offsets = gpu.zeros(5, np.uint32)
        self.cache_lengths = gpu.zeros(4, np.uint32)
        self.lookup_table = gpu.zeros((4, MAX_PAGES), np.uint32)
        self.ids = gpu.zeros(5, np.int32)
        self.ranks = gpu.zeros(5, np.uint32)
        self.group_offsets = gpu.zeros(6, np.uint32)
        self.cache = PagedKVCacheCollection(
            self.blocks,
            self.cache_lengths,
            self.lookup_table,
            np.array([[ROWS, MAX_PAGES * PAGE_SIZE]], np.uint32),  # of any replay
        )
        self.calls: dict[str, Callable[[], Any]] = {
            "shrink": lambda: ops.sgmv_shrink(self.x, self.lora_a[0], *self.groups),
            "lora": lambda: ops.sgmv_lora(self.x, self.lora_a[0], self.lora_b[0], *self.groups),
            "slices": self.slices,
            "qkv": self.qkv,
            "rope": self.rope,
            "rope store": self.rope_store,
            "store": self.store,
            "add": lambda: ops.add_kv(self.kv, self.kv, self.offsets, self.cache, 1),
            "attention": self.attention,
            "step": self.step,
        }

    @property
    def groups(self) -> tuple[Any, Any, Any]:
        return self.ids, self.ranks, self.group_offsets

    def store(self) -> None:
        ops.store_kv(self.kv, self.kv, self.offsets, self.cache, 1)

    def slices(self) -> Any:
        """Two layers, which share a route."""
        route = ops.sgmv_route(self.x, *self.groups, max_num_loras=3)
        y = ops.sgmv_lora_slices(self.x, self.lora_a, self.lora_b, *self.groups, route=route)
        return ops.sgmv_lora(y[0], self.lora_a[0], self.lora_b[0], *self.groups, route=route), *y

    def qkv(self) -> Any:
        return ops.sgmv_qkv_lora(
            self.x,
            self.lora_a,
            self.lora_b,
            *self.groups,
            self.offsets,
            self.cache,
            1,
            slot_ranks=self.slot_ranks,
        )

    def rope(self, q: Any = None) -> Any:
        q = self.q if q is None else q
        return ops.rope_ragged(q, self.offsets, self.cache, self.table, 1)

    def rope_store(self) -> Any:
        return ops.rope_store_kv(self.q, self.kv, self.kv, self.offsets, self.cache, self.table, 1)

    def attention(self, q: Any = None) -> Any:
        q = self.q if q is None else q
        return ops.attention_ragged(q, self.offsets, self.cache, 1, return_lse=True)

    def step(self) -> Any:
        """As the attention layer calls them, intermediates included."""
        self.store()
        out, lse = self.attention(self.rope(self.qkv().reshape(self.q.shape)))
        add_to = out.reshape(ROWS, -1)
        y = ops.sgmv_lora(self.x, self.lora_a[0], self.lora_b[0], *self.groups, add_to=add_to)
        return y, lse

    def rewrite(self, batch: Batch) -> None:
        """New metadata in the same arrays; pages elsewhere; the cache as at the start."""
        ids = np.array([slot for slot, _ in batch.groups], np.int32)
        pages = self.rng.permutation(len(self.start))[: 4 * MAX_PAGES].reshape(4, MAX_PAGES)
        for array, values in (
            (self.offsets, row_offsets(batch.new)),
            (self.cache_lengths, np.array(batch.cached, np.uint32)),
            (self.lookup_table, pages.astype(np.uint32)),
            (self.ids, ids),
            (self.ranks, np.where(ids < 0, 0, 9 + ids).astype(np.uint32)),
            (self.group_offsets, row_offsets([rows for _, rows in batch.groups])),
        ):
            array[...] = self.gpu.asarray(values)
        self.blocks[...] = self.start


def hosts(results: Any) -> list[NDArray[Any]]:
    results = results if isinstance(results, tuple) else (results,)
    return [result.get() for result in results if result is not None]


@each_dtype
@pytest.mark.parametrize(
    "op", ["shrink", "lora", "qkv", "rope", "rope store", "store", "add", "attention", "step"]
)
def test_replay_with_other_metadata(
    op: str, dtype: Any, gpu: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Other lengths, longer and shorter than at the capture, other adapters, other pages."""
    step = Step(gpu, dtype, rng)
    call = step.calls[op]
    step.rewrite(BATCHES["even"])
    call()  # compiles
    step.rewrite(BATCHES["even"])
    with lorakit.Graph() as graph:
        captured = call()
    assert_bitwise_equal(step.blocks, step.start, "the cache: a capture runs nothing")

    seen = []
    for name, batch in BATCHES.items():
        step.rewrite(batch)
        pages = step.lookup_table.copy()
        expected, expected_blocks = hosts(call()), step.blocks.get()
        step.blocks[...] = step.start
        assert (step.lookup_table == pages).all()
        for result in captured if isinstance(captured, tuple) else (captured,):
            if result is not None:
                result.fill(np.nan)  # what an earlier replay left
        graph.replay()
        for one, other in zip(hosts(captured), expected, strict=True):
            assert_bitwise_equal(one, other, name)
        assert_bitwise_equal(step.blocks, expected_blocks, f"{name}, the cache")
        seen.append(b"".join(array.tobytes() for array in [*expected, expected_blocks]))
    # Every batch has a result of its own, so a replay of what was captured would have shown.
    assert len(set(seen)) >= 4
    assert kernels.take_errors() == ""


def test_bad_values_in_a_replay_are_reported(
    gpu: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Reading the errors is no part of an op; the error word is part of the graph."""
    step = Step(gpu, bfloat16, rng)
    step.rewrite(BATCHES["even"])
    step.step()
    with lorakit.Graph() as graph:
        step.step()
    graph.replay()
    assert kernels.take_errors() == ""
    step.ids[1] = 3
    step.lookup_table[2, 2] = len(step.start)
    graph.replay()
    graph.replay()
    errors = kernels.take_errors()
    assert "slot" in errors
    assert "page" in errors
    assert "offsets" not in errors
    step.rewrite(BATCHES["ragged"])
    graph.replay()
    assert kernels.take_errors() == ""
    step.cache_lengths[0] = 1000
    graph.replay()
    with pytest.raises(lorakit.DeviceValueError, match="position"):
        lorakit.check_errors()


def test_metadata_on_the_host_is_refused_in_a_capture(
    gpu: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Each replay would use what it holds now."""
    x, a = gpu.ones((3, 16), np.float32), gpu.ones((1, 4, 16), np.float32)
    offsets = np.array([0, 3], np.int32)
    ops.sgmv_shrink(x, a, gpu.zeros(1, np.int32), None, gpu.asarray(offsets))
    words = "must be on the GPU while a graph is captured"
    with pytest.raises(RuntimeError, match=words), lorakit.Graph():
        ops.sgmv_shrink(x, a, gpu.zeros(1, np.int32), None, offsets)


def test_replay_on_another_stream(
    gpu: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    step = Step(gpu, bfloat16, rng)
    step.rewrite(BATCHES["even"])
    expected = hosts(step.step())
    with lorakit.Graph() as graph:
        captured = step.step()
    step.rng = np.random.default_rng(7)  # the same pages again
    step.rewrite(BATCHES["even"])
    gpu.cuda.Device().synchronize()
    stream = gpu.cuda.Stream(non_blocking=True)
    with stream:
        graph.replay()
    stream.synchronize()
    for one, other in zip(hosts(captured), expected, strict=True):
        assert_bitwise_equal(one, other)


def test_two_graphs_do_not_share_memory(
    gpu: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """A graph's intermediates are its own: replaying the other in between changes nothing."""
    steps = [Step(gpu, bfloat16, rng) for _ in range(2)]
    graphs, results, expected = [], [], []
    for step in steps:
        step.rewrite(BATCHES["even"])
        expected.append(hosts(step.step()))
        with lorakit.Graph() as graph:
            results.append(step.step())
        graphs.append(graph)
    for step in steps:
        step.blocks[...] = step.start
    for graph in graphs:
        graph.replay()
    for captured, other in zip(results, expected, strict=True):
        for one, two in zip(hosts(captured), other, strict=True):
            assert_bitwise_equal(one, two)
    assert (expected[0][0] != expected[1][0]).any()


def test_replay_before_a_capture(gpu: Any) -> None:
    with pytest.raises(RuntimeError, match="nothing was captured"):
        lorakit.Graph().replay()
