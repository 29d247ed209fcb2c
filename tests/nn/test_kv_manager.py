"""Cache parameters, and pages that have one owner each."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorakit import (
    DeviceRef,
    DType,
    KVCacheParams,
    KVCacheStrategy,
    OutOfPagesError,
    PagedKVCacheManager,
)
from tests.nn.helpers import offsets

PARAMS = KVCacheParams(DType.float16, 2, 8, page_size=4)
PAGE_BYTES = 2 * 3 * 4 * 2 * 8 * 2  # key and value, layers, tokens, heads, head_dim, bytes


def manager(device: DeviceRef, pages: int = 10, **options: Any) -> PagedKVCacheManager:
    """Pages of 4 tokens, sequences up to 18."""
    arguments: dict[str, Any] = {
        "params": PARAMS,
        "max_batch_size": 4,
        "max_seq_len": 18,
        "num_layers": 3,
        "devices": [device],
        "cache_memory": pages * PAGE_BYTES,
        "page_size": 4,
        "enable_runtime_checks": True,
    }
    return PagedKVCacheManager(**(arguments | options))


# ---- Parameters ----------------------------------------------------------------------------------


def test_params() -> None:
    assert PARAMS.n_kv_heads_per_device == 2
    assert PARAMS.dtype_shorthand == "f16"
    assert KVCacheParams(DType.bfloat16, 1, 8, page_size=1).dtype_shorthand == "bf16"
    assert PARAMS.cache_strategy is KVCacheStrategy.PAGED
    assert KVCacheStrategy.PAGED.uses_opaque()
    assert KVCacheStrategy.PAGED.kernel_substring() == "paged"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"page_size": None}, ValueError, "page_size must be given"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1"),
        ({"n_kv_heads": 0}, ValueError, "n_kv_heads must be at least 1"),
        ({"head_dim": 12}, ValueError, "head_dim must be a multiple of 8 up to 256, got 12"),
        ({"head_dim": 264}, ValueError, "head_dim must be a multiple of 8 up to 256, got 264"),
        ({"head_dim": 8.0}, TypeError, "head_dim must be an integer"),
        ({"dtype": DType.float8_e4m3fn}, ValueError, "dtype must be one of"),
        ({"enable_prefix_caching": True}, NotImplementedError, "enable_prefix_caching"),
        ({"enable_kvcache_swapping_to_host": True}, NotImplementedError, "enable_kvcache_swapp"),
        ({"host_kvcache_swap_space_gb": 1.0}, NotImplementedError, "host_kvcache_swap_space_gb"),
        ({"n_devices": 2}, NotImplementedError, "n_devices must be 1"),
        ({"data_parallel_degree": 2}, NotImplementedError, "data_parallel_degree must be 1"),
        ({"cache_strategy": "paged"}, TypeError, "cache_strategy must be a lorakit.KVCacheStr"),
    ],
)
def test_params_refusals(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "dtype": DType.float16,
        "n_kv_heads": 2,
        "head_dim": 8,
        "page_size": 4,
    }
    with pytest.raises(error, match=words):
        KVCacheParams(**(arguments | change))


# ---- Construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 3, 128])
def test_blocks_take_as_many_pages_as_fit(device: DeviceRef, to_host: Any, page_size: int) -> None:
    params = KVCacheParams(DType.float16, 2, 8, page_size=page_size)
    bytes_each = PAGE_BYTES // 4 * page_size
    m = manager(
        device,
        params=params,
        page_size=page_size,
        max_seq_len=2,
        cache_memory=7 * bytes_each + bytes_each - 1,
    )
    assert m.num_pages == 7
    assert m.blocks.shape == (7, 2, 3, page_size, 2, 8)
    assert m.blocks.dtype == np.float16
    assert not to_host(m.blocks).any()


def test_sizes_may_be_numpy_integers(device: DeviceRef) -> None:
    m = manager(device, num_layers=np.array([3]), page_size=np.int64(4), max_seq_len=np.uint32(18))
    assert m.blocks.shape == (10, 2, 3, 4, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"page_size": 128}, ValueError, "page_size must be params.page_size = 4, got 128"),
        ({"cache_memory": PAGE_BYTES - 1}, RuntimeError, "cache_memory must hold a page of 768"),
        ({"devices": [DeviceRef.CPU()] * 2}, NotImplementedError, "devices must name one device"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be at least 1"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len must be at least 1"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1"),
    ],
)
def test_constructor_refusals(
    device: DeviceRef, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        manager(device, **change)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"pages": 4, "max_batch_size": 2},
            "4 pages, but one sequence of max_seq_len = 18 needs 5",
        ),
        ({"pages": 5, "max_batch_size": 6}, "one page for each of max_batch_size = 6 needs 6"),
    ],
)
def test_small_caches_warn(device: DeviceRef, options: dict[str, Any], words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        manager(device, **options)


# ---- Requests ------------------------------------------------------------------------------------


def test_a_request_from_claim_to_release(device: DeviceRef, to_host: Any) -> None:
    m = manager(device)
    m.claim("a")
    assert m.contains("a")
    assert not m.contains("b")
    c = m.fetch(["a"], [6])
    assert c.blocks is m.blocks
    assert to_host(c.cache_lengths).tolist() == [0]
    assert to_host(c.lookup_table).tolist() == [[0, 1, 10, 10, 10]]
    assert c.max_lengths.tolist() == [[6, 6]]
    assert {str(a.dtype) for a in (c.cache_lengths, c.lookup_table, c.max_lengths)} == {"uint32"}
    m.step(["a"])
    c = m.fetch(["a"], [1])
    assert to_host(c.cache_lengths).tolist() == [6]
    assert c.max_lengths.tolist() == [[1, 7]]
    m.step(["a"])
    assert m.get_req_blocks("a") == [0, 1]
    assert (m.num_free_blocks, m.used_blocks_pct, m.free_blocks_pct) == (8, 1 - 0.8, 0.8)
    m.release("a")
    assert m.num_free_blocks == 10
    assert not m.contains("a")


def test_batches_and_unused_entries(device: DeviceRef, to_host: Any) -> None:
    m = manager(device)
    for request in "abc":
        m.claim(request)
    m.fetch(["b"], [9])
    m.step(["b"])
    c = m.fetch(["a", "b", "c"], [4, 4, 0])
    assert to_host(c.cache_lengths).tolist() == [0, 9, 0]
    assert to_host(c.lookup_table).tolist() == [
        [3, 10, 10, 10, 10],
        [0, 1, 2, 4, 10],
        [10, 10, 10, 10, 10],
    ]
    assert c.max_lengths.tolist() == [[4, 13]]


def test_an_empty_batch(device: DeviceRef) -> None:
    c = manager(device).fetch([], [])
    assert c.cache_lengths.shape == (0,)
    assert c.lookup_table.shape == (0, 5)
    assert c.max_lengths.tolist() == [[0, 0]]


def test_a_fetch_that_was_not_run_is_replaced(device: DeviceRef, to_host: Any) -> None:
    m = manager(device)
    m.claim("a")
    m.fetch(["a"], [7])
    m.fetch(["a"], [3])
    m.step(["a"])
    m.step(["a"])  # counts nothing twice
    assert to_host(m.fetch(["a"], [1]).cache_lengths).tolist() == [3]


def test_pages_are_reused_least_recently_freed_first(device: DeviceRef) -> None:
    m = manager(device)
    for request in "abc":
        m.claim(request)
        m.allocate(request, 8)  # pages 0 1, 2 3, 4 5; 6 7 8 9 are free
    m.release("b")
    m.release("a")
    m.claim("d")
    m.allocate("d", 18)
    m.claim("e")
    m.allocate("e", 12)
    assert m.get_req_blocks("d") == [6, 7, 8, 9, 2]
    assert m.get_req_blocks("e") == [3, 0, 1]


def test_allocate_keeps_pages_for_the_fetch(device: DeviceRef, to_host: Any) -> None:
    m = manager(device)
    m.claim("a")
    m.claim("b")
    m.allocate("a", 7)
    m.allocate("b", 1)
    m.allocate("a", 5)  # has them
    assert to_host(m.fetch(["a"], [9]).lookup_table).tolist() == [[0, 1, 3, 10, 10]]
    assert to_host(m.fetch(["b"], [1]).cache_lengths).tolist() == [0]


def test_running_out_of_pages_changes_nothing(device: DeviceRef, to_host: Any) -> None:
    m = manager(device, pages=7)
    for request in "abc":
        m.claim(request)
    m.fetch(["a", "b"], [15, 4])
    with pytest.raises(OutOfPagesError, match="needs 3 more pages, but 2 are free") as caught:
        m.fetch(["b", "c"], [12, 4])
    assert (caught.value.needed, caught.value.free) == (3, 2)
    assert isinstance(caught.value, RuntimeError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.needed, again.free, str(again)) == (3, 2, str(caught.value))
    assert [m.get_req_blocks(r) for r in "abc"] == [[0, 1, 2, 3], [4], []]
    assert m.num_free_blocks == 2
    m.step(["a", "b"])  # the earlier fetch still counts
    assert to_host(m.fetch(["a", "b"], [1, 0]).cache_lengths).tolist() == [15, 4]
    m.release("a")
    m.fetch(["b", "c"], [12, 4])


def test_sequences_longer_than_max_seq_len(device: DeviceRef) -> None:
    m = manager(device)
    m.claim("a")
    m.claim("b")
    m.fetch(["a"], [18])
    m.step(["a"])
    with pytest.raises(RuntimeError, match="'a' would have 19 tokens, more than max_seq_len = 18"):
        m.fetch(["b", "a"], [4, 1])
    assert m.get_req_blocks("b") == []
    with pytest.raises(RuntimeError, match="would have 19 tokens"):
        m.fetch(["b"], [17], num_steps=3)
    with pytest.raises(RuntimeError, match="would have 19 tokens"):
        m.allocate("b", 19)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.claim("a"), "request_id must not be claimed yet, got 'a'"),
        (lambda m: m.claim("e"), "request_id 'e' must wait: max_batch_size = 4"),
        (lambda m: m.release("x"), "request_id must be claimed, got 'x'"),
        (lambda m: m.step(["a", "x"]), "request_id must be claimed, got 'x'"),
        (lambda m: m.get_req_blocks("x"), "request_id must be claimed, got 'x'"),
        (lambda m: m.fetch(["a", "x"], [1, 1]), "request_id must be claimed, got 'x'"),
        (lambda m: m.fetch(["a", "a"], [1, 1]), "request_ids must name each request once"),
        (lambda m: m.fetch(["a"], [1, 1]), "num_tokens must have one entry for each of 1"),
        (lambda m: m.fetch(["a"], [-1]), "num_tokens must not be negative, got -1"),
        (lambda m: m.fetch(["a"], [1], num_steps=0), "num_steps must be at least 1"),
        (lambda m: m.allocate("a", -1), "num_tokens must not be negative"),
    ],
)
def test_refusals(device: DeviceRef, call: Any, words: str) -> None:
    m = manager(device)
    for request in "abcd":
        m.claim(request)
    with pytest.raises(ValueError, match=words):
        call(m)
    assert m.num_free_blocks == 10


# ---- Several steps, and rewriting in place -------------------------------------------------------


def test_several_steps(device: DeviceRef, to_device: Any, to_host: Any) -> None:
    m = manager(device)
    m.claim("a")
    m.claim("b")
    c = m.fetch(["a", "b"], [7, 2], num_steps=3)
    assert c.max_lengths.tolist() == [[7, 7], [1, 8], [1, 9]]
    assert [len(m.get_req_blocks(r)) for r in "ab"] == [3, 1]
    second = m.increment_cache_lengths(c, offsets(7, 2))
    assert to_host(second.cache_lengths).tolist() == [7, 2]
    assert to_host(second.cache_lengths).dtype == np.uint32
    assert to_host(c.cache_lengths).tolist() == [0, 0]
    assert second.max_lengths.tolist() == [[1, 8], [1, 9]]
    assert second.lookup_table is c.lookup_table
    assert second.blocks is m.blocks
    third = m.increment_cache_lengths(second, to_device(offsets(1, 1).astype(np.int32)))
    assert to_host(third.cache_lengths).tolist() == [8, 3]
    assert to_host(third.cache_lengths).dtype == np.uint32
    with pytest.raises(ValueError, match="collection must have a step left"):
        m.increment_cache_lengths(third, offsets(1, 1))
    with pytest.raises(ValueError, match="input_row_offsets has batch_size = 1"):
        m.increment_cache_lengths(c, offsets(7))
    with pytest.raises(TypeError, match="input_row_offsets must be uint32 or int32"):
        m.increment_cache_lengths(c, offsets(7, 2).astype(np.int64))
    with pytest.raises(ValueError, match="input_row_offsets must not decrease, got 7 before 2"):
        m.increment_cache_lengths(c, np.array([0, 7, 2], np.uint32))
    m.step(["a", "b"])
    assert to_host(m.fetch(["a", "b"], [1, 1]).cache_lengths).tolist() == [9, 4]


def test_out_is_rewritten_in_place(device: DeviceRef, to_host: Any) -> None:
    m = manager(device)
    for request in "abc":
        m.claim(request)
    out = m.fetch(["a", "b"], [4, 5])
    arrays = (out.cache_lengths, out.lookup_table, out.max_lengths)
    m.step(["a", "b"])
    assert m.fetch(["b", "c"], [1, 3], out=out) is out
    assert all(
        a is b
        for a, b in zip(arrays, (out.cache_lengths, out.lookup_table, out.max_lengths), strict=True)
    )
    assert to_host(arrays[0]).tolist() == [5, 0]
    assert to_host(arrays[1]).tolist() == [[1, 2, 10, 10, 10], [3, 10, 10, 10, 10]]
    assert arrays[2].tolist() == [[3, 6]]


def test_an_out_that_does_not_fit_changes_nothing(device: DeviceRef) -> None:
    m, other = manager(device), manager(device)
    m.claim("a")
    m.claim("b")
    other.claim("a")
    out = m.fetch(["a"], [1])
    with pytest.raises(ValueError, match=r"out.cache_lengths must have shape \[2\], got \(1,\)"):
        m.fetch(["a", "b"], [5, 1], out=out)
    with pytest.raises(ValueError, match=r"out.max_lengths must have shape \[2, 2\]"):
        m.fetch(["a"], [5], num_steps=2, out=out)
    with pytest.raises(ValueError, match="out must be a collection that this manager fetched"):
        m.fetch(["a"], [5], out=other.fetch(["a"], [1]))
    out.cache_lengths = out.cache_lengths.astype(np.float32)
    with pytest.raises(TypeError, match=r"out\.cache_lengths must be uint32, got float32"):
        m.fetch(["a"], [5], out=out)
    assert m.get_req_blocks("a") == [0]
    assert m.get_req_blocks("b") == []


# ---- Any sequence of calls -----------------------------------------------------------------------

NAMES = st.sampled_from("abcdef")


class Pages(RuleBasedStateMachine):
    """Random calls against a model that only counts tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = manager(DeviceRef.CPU(), pages=7)
        self.lengths: dict[str, int] = {}
        self.pending: dict[str, int] = {}
        self.reserved: dict[str, int] = {}  # most tokens that pages were asked for

    @rule(name=NAMES)
    def claim(self, name: str) -> None:
        if name in self.lengths or len(self.lengths) == 4:
            with pytest.raises(ValueError, match="request_id"):
                self.manager.claim(name)
            return
        self.manager.claim(name)
        self.lengths[name] = self.reserved[name] = 0

    @rule(data=st.data(), steps=st.integers(1, 2))
    @precondition(lambda self: self.lengths)
    def fetch(self, data: st.DataObject, steps: int) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.lengths)), unique=True, min_size=1))
        counts = data.draw(st.lists(st.integers(0, 9), min_size=len(names), max_size=len(names)))
        totals = {n: self.lengths[n] + c + steps - 1 for n, c in zip(names, counts, strict=True)}
        wanted = {n: max(self.reserved[n], totals.get(n, 0)) for n in self.lengths}
        pages = sum(-(-tokens // 4) for tokens in wanted.values())
        before = {n: self.manager.get_req_blocks(n) for n in self.lengths}
        if max(totals.values()) > 18 or pages > 7:
            with pytest.raises(RuntimeError):
                self.manager.fetch(names, counts, steps)
            assert before == {n: self.manager.get_req_blocks(n) for n in self.lengths}
            return
        c = self.manager.fetch(names, counts, steps)
        self.reserved = wanted
        for row, name in enumerate(names):
            owned = self.manager.get_req_blocks(name)
            assert owned[: len(before[name])] == before[name]  # cached tokens stay where they are
            assert c.cache_lengths[row] == self.lengths[name]
            assert c.lookup_table[row].tolist() == owned + [7] * (5 - len(owned))
            self.pending[name] = totals[name] - self.lengths[name]

    @rule(data=st.data())
    @precondition(lambda self: self.lengths)
    def step(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.lengths)), unique=True))
        self.manager.step(names)
        for name in names:
            self.lengths[name] += self.pending.pop(name, 0)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        if name not in self.lengths:
            with pytest.raises(ValueError, match="must be claimed"):
                self.manager.release(name)
            return
        self.manager.release(name)
        del self.lengths[name], self.reserved[name]
        self.pending.pop(name, None)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        owned = [page for name in self.lengths for page in self.manager.get_req_blocks(name)]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(7))
        assert self.manager.num_free_blocks == 7 - len(owned)
        for name, tokens in self.reserved.items():
            assert len(self.manager.get_req_blocks(name)) == -(-tokens // 4)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
