"""What is refused, word for word: the argument, what was wanted, what came."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorakit import checks
from lorakit.dtypes import bfloat16
from tests.conftest import KernelDevice


def refused(kind: type[Exception], message: str, check: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        check()
    assert type(caught.value) is kind
    assert str(caught.value) == message


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


# ---- Shapes --------------------------------------------------------------------------------------------


def test_shapes_give_sizes() -> None:
    sizes = checks.check_shapes(
        x=(zeros(5, 64), "total_tokens in_dim"),
        lora_a=(zeros(2, 8, 64), "slots rank in_dim"),
        offsets=(zeros(4), "groups+1"),
        ids=(zeros(3), "groups"),
        blocks=(zeros(9, 2), "pages 2"),
    )
    assert sizes == {
        "total_tokens": 5, "in_dim": 64, "slots": 2, "rank": 8, "groups": 3, "pages": 9
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": (zeros(5, 64), "rows in_dim"), "a": (zeros(2, 65), "rank in_dim")},
            "a has in_dim = 65, but x has 64",
        ),
        (
            {"ids": (zeros(4), "groups"), "offsets": (zeros(4), "groups+1")},
            "offsets has groups = 3, but ids has 4",
        ),
        ({"x": (zeros(5), "rows in_dim")}, "x must have shape [rows, in_dim], got (5,)"),
        ({"x": (zeros(5, 3), "rows 2")}, "x must have shape [rows, 2], got (5, 3)"),
        ({"x": (zeros(0), "groups+1")}, "x must have at least one element (groups+1), got (0,)"),
    ],
)
def test_shapes(arrays: dict[str, Any], message: str) -> None:
    refused(ValueError, message, lambda: checks.check_shapes(**arrays))


@pytest.mark.parametrize(("value", "name"), [([1.0], "list"), (None, "NoneType"), (3, "int")])
def test_no_array(value: object, name: str) -> None:
    refused(
        TypeError,
        f"x must be an array [rows in_dim], got {name}",
        lambda: checks.check_shapes(x=(value, "rows in_dim")),
    )


# ---- Dtypes, memory, device ----------------------------------------------------------------------------


def test_dtypes() -> None:
    checks.check_dtype((np.float16, bfloat16), x=zeros(1, dtype=bfloat16))
    refused(
        TypeError,
        "y must be float16 or bfloat16, got float64",
        lambda: checks.check_dtype(
            (np.float16, bfloat16), x=zeros(1, dtype=np.float16), y=np.zeros(1)
        ),
    )


def aligned(*shape: int, offset: int = 0) -> np.ndarray[Any, Any]:
    """float32 zeros that start `offset` bytes past a multiple of 16."""
    size = 4 * int(np.prod(shape))
    memory = np.zeros(size + 32, np.uint8)
    begin = -memory.ctypes.data % 16 + offset
    return memory[begin : begin + size].view(np.float32).reshape(shape)


def test_contiguous() -> None:
    checks.check_contiguous(x=aligned(4, 8), nothing=zeros(0, 3))
    checks.check_vectors(x=aligned(4, 8, offset=4))
    for check in (checks.check_contiguous, checks.check_vectors):
        refused(
            ValueError,
            "x must be C-contiguous, got strides (4, 32)",
            lambda check=check: check(x=aligned(4, 8).T),  # type: ignore[misc]
        )
    array = aligned(4, 8, offset=4)
    refused(
        ValueError,
        "x must start each row at a multiple of 16 bytes, "
        f"got address {array.ctypes.data:#x} and strides (32, 4)",
        lambda: checks.check_contiguous(x=array),
    )


def test_rows() -> None:
    wide = aligned(4, 3, 8)
    for good in (wide, wide[:, :2], wide[:, 1], wide[::2], wide[:0]):
        checks.check_rows(x=good)
        checks.check_aligned_rows(x=good)
    refused(
        ValueError,
        "x must be C-contiguous within a row, got strides (96, 8)",
        lambda: checks.check_rows(x=wide[:, 0, ::2]),
    )
    refused(
        ValueError,
        "x must have rows in ascending order, got strides (-96, 32, 4)",
        lambda: checks.check_aligned_rows(x=wide[::-1]),
    )
    odd = aligned(4, 9)[:, :8]
    checks.check_rows(x=odd)
    refused(
        ValueError,
        "x must start each row at a multiple of 16 bytes, "
        f"got address {odd.ctypes.data:#x} and strides (36, 4)",
        lambda: checks.check_aligned_rows(x=odd),
    )


def test_is_aligned() -> None:
    assert checks.is_aligned(aligned(4, 8), aligned(3, 4), zeros(0, 3))
    assert not checks.is_aligned(aligned(4, 8), aligned(4, 8, offset=8))
    assert not checks.is_aligned(aligned(4, 9)[:, :8])


def test_same_place(kernels: KernelDevice) -> None:
    host, device = zeros(2), kernels.asarray(zeros(2))
    checks.check_same_place(x=host, y=host)
    checks.check_same_place(x=device, y=device)
    there = "the emulator" if kernels.name == "emulator" else "GPU 0"
    refused(
        TypeError,
        f"y must be on the CPU as x is, got {there}",
        lambda: checks.check_same_place(x=host, z=host, y=device),
    )


# ---- Values, of host arrays only -----------------------------------------------------------------------


def offsets(*values: int, dtype: Any = np.uint32) -> np.ndarray[Any, Any]:
    return np.array(values, dtype)


def check_offsets(array: Any, **keywords: Any) -> Callable[[], None]:
    keywords = {"rows": 10, "exact": True, **keywords}
    return lambda: checks.check_offsets("offsets", array, **keywords)


def test_good_offsets() -> None:
    check_offsets(offsets(0, 3, 3, 10))()
    check_offsets(offsets(0, 3), exact=False)()
    check_offsets(offsets(5, 8, 15), start=False)()
    check_offsets(offsets(0), rows=0)()


@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
def test_offsets(dtype: Any) -> None:
    for check, message in (
        (check_offsets(offsets(1, 10, dtype=dtype)), "offsets must start at 0, got 1"),
        (
            check_offsets(offsets(0, 7, 5, 10, dtype=dtype)),
            "offsets must not decrease, got 7 before 5",
        ),
        (
            check_offsets(offsets(0, 9, dtype=dtype)),
            "offsets must end at 10, the number of rows, got 9",
        ),
        (
            check_offsets(offsets(0, 11, dtype=dtype), exact=False),
            "offsets must end at most 10, the number of rows, got 11",
        ),
        (
            check_offsets(offsets(5, 16, dtype=dtype), start=False),
            "offsets must end at 10, the number of rows, got 11",
        ),
    ):
        refused(ValueError, message, check)


def test_negative_offsets() -> None:
    refused(
        ValueError,
        "offsets must not decrease, got 0 before -2",
        check_offsets(offsets(0, -2, 10, dtype=np.int32)),
    )


def test_ids_and_ranks() -> None:
    checks.check_ids(np.array([3, -1, -7], np.int32), 4)
    checks.check_ids(np.zeros(0, np.int32), 0)
    checks.check_ranks("lora_ranks", np.array([0, 10**6]))
    refused(
        ValueError,
        "lora_ids must be below max_num_loras = 4, got 4",
        lambda: checks.check_ids(np.array([0, 4], np.int32), 4),
    )
    refused(
        ValueError,
        "lora_ranks must not be negative, got -1",
        lambda: checks.check_ranks("lora_ranks", np.array([2, -1], np.int32)),
    )


def collection(lengths: list[int], table: list[list[int]]) -> Any:
    return SimpleNamespace(
        cache_lengths=np.array(lengths, np.uint32),
        lookup_table=np.array(table, np.uint32).reshape(len(lengths), -1),
    )


def check_pages(cache: Any, row_offsets: Any, batch_offset: int = 0) -> None:
    """Of 5 pages of 4 tokens."""
    checks.check_pages(cache, row_offsets, num_pages=5, page_size=4, batch_offset=batch_offset)


def test_pages() -> None:
    """What lies past a sequence's length is not looked at."""
    check_pages(collection([3, 0], [[4, 99], [99, 99]]), offsets(0, 1, 1))
    check_pages(collection([9, 3], [[99, 99], [0, 4]]), offsets(2, 7), batch_offset=1)
    refused(
        ValueError,
        "lookup_table must have 3 pages for the 9 tokens of sequence 1, got 2",
        lambda: check_pages(collection([0, 8], [[0, 1], [2, 3]]), offsets(0, 1, 2)),
    )
    refused(
        ValueError,
        "lookup_table must hold pages in [0, 5) for the 5 tokens of sequence 0, got 5",
        lambda: check_pages(collection([4], [[0, 5]]), offsets(0, 1)),
    )
    refused(
        ValueError,
        "lookup_table must hold pages in [0, 5) for the 4 tokens of sequence 1, got 7",
        lambda: check_pages(collection([0, 3], [[0], [7]]), offsets(4, 5), batch_offset=1),
    )


def test_positions() -> None:
    cache = collection([10, 3], [[0], [1]])
    checks.check_positions(zeros(5, 8), cache, offsets(0, 0, 2))
    refused(
        ValueError,
        "freqs_cis must have a row for each of 5 positions, got 4",
        lambda: checks.check_positions(zeros(4, 8), cache, offsets(0, 0, 2)),
    )


def test_layer_idx() -> None:
    checks.check_layer_idx(1, 2)
    for layer_idx in (-1, 2):
        refused(
            ValueError,
            f"layer_idx must be in [0, 2), got {layer_idx}",
            lambda layer_idx=layer_idx: checks.check_layer_idx(layer_idx, 2),  # type: ignore[misc]
        )
    for other in (1.0, True, None, "1", np.float32(1), np.array(1)):
        refused(
            TypeError,
            f"layer_idx must be an integer, got {type(other).__name__}",
            lambda other=other: checks.check_layer_idx(other, 2),  # type: ignore[misc]
        )


def test_device_values_are_not_read(kernels: KernelDevice) -> None:
    """Bad values on the device are for the kernels: looking at them would wait for the device."""
    bad = kernels.asarray(np.array([5, 3, 99], np.int32))
    check_offsets(bad)()
    checks.check_ids(bad, 4)
    checks.check_ranks("lora_ranks", kernels.asarray(np.array([-1], np.int32)))
    cache = collection([99], [[99]])
    cache.lookup_table = kernels.asarray(cache.lookup_table)
    check_pages(cache, offsets(0, 1))
    cache.cache_lengths = kernels.asarray(cache.cache_lengths)
    checks.check_positions(zeros(1, 8), cache, offsets(0, 1))
