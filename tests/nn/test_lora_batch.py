"""Grouping of rows by adapter."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit import DeviceRef, DType, LinearLoRA, build_lora_batch, sort_lora_batch
from tests.nn.helpers import offsets

SLOTS = {"a": 0, "b": 1}
RANKS = [8, 4]

# (adapters, tokens) -> ids, ranks, offsets: MAX's own vectors, for its documented version.
VECTORS = [
    pytest.param(["a"], [10], [0], [8], [0, 10], id="one adapter"),
    pytest.param(["a", "b"], [5, 10], [0, 1], [8, 4], [0, 5, 15], id="two adapters"),
    pytest.param(["a", "a", "b"], [5, 5, 10], [0, 1], [8, 4], [0, 10, 20], id="neighbours merge"),
    pytest.param([None, None], [5, 10], [-1], [0], [0, 15], id="base only"),
    pytest.param(["a", None], [10, 15], [0, -1], [8, 0], [0, 10, 25], id="adapter and base"),
    pytest.param(
        ["a", "b", ""], [10, 15, 20], [0, 1, -1], [8, 4, 0], [0, 10, 25, 45], id="two and base"
    ),
    pytest.param(
        ["a", None, "a"], [1, 2, 3], [0, -1, 0], [8, 0, 8], [0, 1, 3, 6], id="no merge across base"
    ),
    pytest.param(["a", "b"], [0, 3], [0, 1], [8, 4], [0, 0, 3], id="empty sequence"),
    pytest.param([], [], [], [], [0], id="no sequences"),
]


@pytest.mark.parametrize(("adapters", "tokens", "ids", "ranks", "groups"), VECTORS)
def test_vectors(
    adapters: list[str | None], tokens: list[int], ids: Any, ranks: Any, groups: Any
) -> None:
    batch = build_lora_batch(adapters, offsets(*tokens), RANKS, slots=SLOTS)
    np.testing.assert_array_equal(batch.lora_ids, np.array(ids, np.int32), strict=True)
    np.testing.assert_array_equal(batch.lora_ranks, np.array(ranks, np.uint32), strict=True)
    np.testing.assert_array_equal(batch.lora_grouped_offsets, np.array(groups, "u4"), strict=True)


def test_spellings_of_the_base_model_and_of_a_slot() -> None:
    names = [None, "", "org/base", -1, -7]
    batch = build_lora_batch(names, offsets(1, 1, 1, 1, 1), {}, base_path="org/base")
    assert batch.lora_ids.tolist() == [-1]
    batch = build_lora_batch(["b", 1, np.int64(1)], offsets(2, 2, 2), {1: 4}, slots=SLOTS)
    assert batch.lora_ids.tolist() == [1]
    assert batch.lora_ranks.tolist() == [4]


def test_padding_adds_empty_base_groups() -> None:
    batch = build_lora_batch([1, 0], offsets(3, 4), RANKS, num_groups=4)
    assert batch.lora_ids.tolist() == [1, 0, -1, -1]
    assert batch.lora_ranks.tolist() == [4, 8, 0, 0]
    assert batch.lora_grouped_offsets.tolist() == [0, 3, 7, 7, 7]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"adapters": [0]}, ValueError, "adapters must have one entry for each of 2 seq"),
        ({"adapters": ["c", "a"]}, ValueError, "adapters must be names in slots, got 'c'"),
        ({"adapters": [2, 0]}, ValueError, "ranks must have the rank of slot 2"),
        ({"adapters": [0.5, 0]}, TypeError, "adapters must be an integer"),
        ({"slots": {"a": -1, "b": 0}}, ValueError, "slots must not be negative, got -1"),
        ({"ranks": {0: 8}}, ValueError, "ranks must have the rank of slot 1"),
        ({"ranks": [8, -4]}, ValueError, "ranks must not be negative, got -4 for slot 1"),
        ({"num_groups": 1}, ValueError, "num_groups must be at least 2, got 1"),
        ({"input_row_offsets": [0, 3, 7]}, TypeError, "input_row_offsets must be a NumPy array"),
        ({"input_row_offsets": np.array([0, 3, 7])}, TypeError, "input_row_offsets must be"),
        ({"input_row_offsets": np.array([1, 3, 7], "u4")}, ValueError, "must start at 0, got 1"),
        ({"input_row_offsets": np.array([0, 8, 7], "u4")}, ValueError, "must not decrease"),
        ({"input_row_offsets": np.zeros(0, "u4")}, ValueError, "input_row_offsets must have"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "adapters": ["a", "b"],
        "input_row_offsets": offsets(3, 4),
        "ranks": RANKS,
        "slots": SLOTS,
    }
    with pytest.raises(error, match=words):
        build_lora_batch(**(arguments | change))


@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 4)), max_size=12))
def test_every_row_keeps_its_adapter(batch: list[tuple[int, int]]) -> None:
    adapters = [max(adapter, -1) for adapter, _ in batch]
    lengths = [length for _, length in batch]
    ids, ranks, groups = build_lora_batch(adapters, offsets(*lengths), [1, 2, 3, 4])
    assert np.repeat(ids, np.diff(groups.astype(int))).tolist() == [
        adapter for adapter, length in zip(adapters, lengths, strict=True) for _ in range(length)
    ]
    assert [int(i) + 1 for i in ids] == ranks.tolist()
    assert all(a != b for a, b in itertools.pairwise(ids))


def test_on_a_device(device: DeviceRef, to_host: Any) -> None:
    batch = build_lora_batch([1, None], offsets(3, 4), RANKS, device=device)
    layer = LinearLoRA(4, 4, 2, 2, DType.float32, device)
    layer.set_lora_batch_info(*batch)
    assert to_host(layer.lora_ids).tolist() == [1, -1]
    assert to_host(batch.lora_grouped_offsets).tolist() == [0, 3, 7]


def test_sorting_is_stable_descending_and_can_be_undone() -> None:
    adapters = ["b", None, "a", "b", "", "a"]
    order, inverse = sort_lora_batch(adapters, slots=SLOTS)
    assert order.tolist() == [0, 3, 2, 5, 1, 4]
    results = [adapters[b] for b in order]
    assert [results[i] for i in inverse] == adapters
    order, _ = sort_lora_batch([1, 0] * 50)
    assert order.tolist() == [*range(0, 100, 2), *range(1, 100, 2)]


@given(st.lists(st.integers(-3, 5), max_size=20))
def test_sorted_results_go_back_to_their_requests(adapters: list[int]) -> None:
    order, inverse = sort_lora_batch(adapters)
    assert [order[i] for i in inverse] == list(range(len(adapters)))
    slots = [max(adapters[b], -1) for b in order]
    assert slots == sorted(slots, reverse=True)
