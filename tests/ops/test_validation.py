"""What ops refuse: each message names the argument, what was wanted and what came; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit import ops
from lorakit.dtypes import bfloat16
from lorakit.testing import assert_bitwise_equal, rotary_table
from tests.emulator import emulator
from tests.ops.helpers import FLOAT32, CacheCase

CASE = CacheCase(
    "", (3, 0), (2, 3), page_size=4, n_heads=4, n_kv_heads=2, head_dim=16, dtype=FLOAT32
)
ROWS, IN_DIM, RANK, SLOTS = 5, 24, 8, 3


def ones(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.ones(shape, dtype)


def ints(*values: int, dtype: Any = np.int32) -> NDArray[Any]:
    return np.array(values, dtype)


def good(op: str) -> dict[str, Any]:
    """Arguments of a right call by name; `kv` is the cache."""
    cache = CASE.cache(np.random.default_rng(0))
    segments = {
        "lora_ids": ints(0, -1, 2),
        "lora_ranks": ints(8, 0, 4, dtype=np.uint32),
        "lora_grouped_offsets": ints(0, 2, 3, 5),
    }
    step = {"input_row_offsets": CASE.offsets(), "kv_collection": cache, "layer_idx": 1}
    x, a, b = ones(ROWS, IN_DIM), ones(SLOTS, RANK, IN_DIM), ones(SLOTS, 32, RANK)
    ranks, bias = ints(8, 8, 4), ones(SLOTS, 32)
    kv = {"k": ones(ROWS, 2, 16), "v": ones(ROWS, 2, 16)}
    add_to = ones(ROWS, 32)
    expand = {**segments, "slot_ranks": ranks, "bias": bias, "add_to": add_to}
    arguments: dict[str, dict[str, Any]] = {
        "sgmv_shrink": {"x": x, "lora_a": a, **segments, "slot_ranks": ranks},
        "sgmv_expand": {"h": ones(ROWS, RANK), "lora_b": b, **expand},
        "sgmv_lora": {"x": x, "lora_a": a, "lora_b": b, **expand},
        "sgmv_qkv_lora": {
            "x": x,
            "lora_a": [a] * 3,
            "lora_b": [ones(SLOTS, 64, RANK), b, b],
            **segments,
            **step,
            "slot_ranks": [ranks] * 3,
            "bias": None,
        },
        "sgmv_lora_slices": {
            "x": x,
            "lora_a": [a, ones(SLOTS, 5, IN_DIM)],
            "lora_b": [b, ones(SLOTS, 7, 5)],
            **segments,
            "slot_ranks": [ranks, None],
            "bias": [None, ones(SLOTS, 7)],
            "add_to": [add_to, ones(ROWS, 7)],
            "route": None,
        },
        "sgmv_route": {"x": x, **segments, "max_num_loras": SLOTS},
        "store_kv": {**kv, **step},
        "add_kv": {**kv, **step, "batch_offset": 0},
        "rope_ragged": {"q": ones(ROWS, 4, 16), **step, "freqs_cis": rotary_table(8, 16)},
        "rope_store_kv": {
            "q": ones(ROWS, 4, 16),
            **kv,
            **step,
            "freqs_cis": rotary_table(8, 16),
        },
        "attention_ragged": {
            "q": ones(ROWS, 4, 16),
            **step,
            "scale": None,
            "window": (3, None),
            "soft_cap": 2.0,
            "sinks": ones(4),
        },
        "linear": {"x": x, "weight": ones(7, IN_DIM), "bias": ones(7)},
    }
    return arguments[op]


@dataclass(frozen=True)
class Refusal:
    """A right call with one argument damaged; ``kv.name`` is an array of the cache."""

    op: str
    argument: str
    damage: Any
    """The new value, or a function of the old one."""
    message: str
    error: type[Exception] = ValueError


def fortran(array: NDArray[Any]) -> NDArray[Any]:
    return np.asfortranarray(array)


def off_by_4(array: NDArray[Any]) -> NDArray[Any]:
    """The same array, 4 bytes past a multiple of 16."""
    memory = np.empty(array.nbytes + 32, np.uint8)
    start = -memory.ctypes.data % 16 + 4
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def row_gaps(array: NDArray[Any]) -> NDArray[Any]:
    """The same rows, 4 bytes more than a multiple of 16 from one to the next."""
    wide = np.zeros((len(array), array[0].size + 1), array.dtype)
    wide[:, :-1] = array.reshape(len(array), -1)
    return wide[:, :-1].reshape(array.shape)


def one_row(array: NDArray[Any]) -> NDArray[Any]:
    """The same shape, but every row is the first one."""
    return np.lib.stride_tricks.as_strided(array, strides=(0, *array.strides[1:]))


def odd_strides(array: NDArray[Any]) -> NDArray[Any]:
    """The same array, elements of the last axis a byte more apart than they are large."""
    shape, size = array.shape, array.dtype.itemsize + 1
    strides = (shape[1] * shape[2] * size, shape[2] * size, size)
    view = np.ndarray(shape, array.dtype, np.zeros(array.size * size, np.uint8), strides=strides)
    view[...] = array
    return view


def in_type(dtype: Any) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda array: array.astype(dtype)


class Unknown:
    """An array of a library that ops do not know."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array, name)


def last(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda arrays: [*arrays[:-1], value]


R, T = Refusal, TypeError
REFUSALS = (
    # Slices and routes.
    R("sgmv_lora_slices", "lora_a", [], "lora_a must have at least one array, got none"),
    R("sgmv_lora_slices", "lora_b", [], "lora_b must have 2 arrays, got 0"),
    R("sgmv_lora_slices", "slot_ranks", [None], "slot_ranks must have 2 arrays, got 1"),
    R("sgmv_lora_slices", "bias", [None] * 3, "bias must have 2 arrays, got 3"),
    R("sgmv_lora_slices", "add_to", [], "add_to must have 2 arrays, got 0"),
    R("sgmv_lora_slices", "lora_a", last(ones(SLOTS, 5, 23)), "lora_a has in_dim = 23, but x has"),
    R("sgmv_lora_slices", "lora_b", last(ones(SLOTS, 7, 6)), "has max_lora_rank = 6, but lora_a"),
    R("sgmv_lora_slices", "add_to", last(None), "add_to must be an array .*, got NoneType", T),
    R("sgmv_lora_slices", "lora_a", iter([1]), "lora_a must be a sequence of .*, got list_iter", T),
    R("sgmv_lora_slices", "lora_b", None, "lora_b must be a sequence of arrays, got NoneType", T),
    R("sgmv_lora_slices", "bias", iter([1]), "bias must be a sequence of arrays, got list_iter", T),
    R("sgmv_lora_slices", "add_to", 3, "add_to must be a sequence of arrays, got int", T),
    R("sgmv_lora", "lora_a", odd_strides, "lora_a must have strides of whole elements, got"),
    R("sgmv_lora", "lora_b", odd_strides, "lora_b must have strides of whole elements, got"),
    R("sgmv_lora_slices", "route", 3, "route must be made by sgmv_route, got int", T),
    R("sgmv_route", "x", 3, r"x must be an array \[total_tokens, ...\], got int", T),
    R("sgmv_route", "max_num_loras", 3.0, "max_num_loras must be an integer, got float", T),
    R("sgmv_route", "max_num_loras", -1, "max_num_loras must not be negative, got -1"),
    R("sgmv_route", "max_num_loras", 2, "lora_ids must be below max_num_loras = 2, got 2"),
    R("sgmv_route", "lora_ids", ints(0, -1), "lora_ranks has groups = 3, but lora_ids has 2"),
    R("sgmv_route", "lora_grouped_offsets", ints(0, 2, 3, 6), "must end at most 5"),
    # Not an array; axes; sizes.
    R("sgmv_shrink", "x", [[1.0]], r"x must be an array \[total_tokens in_dim\], got list", T),
    R("sgmv_shrink", "x", ones(5), r"x must have shape \[total_tokens, in_dim\], got \(5,\)"),
    R("sgmv_shrink", "x", ones(5, 25), "lora_a has in_dim = 24, but x has 25"),
    R("sgmv_shrink", "lora_ranks", ints(1, 2), "lora_ranks has groups = 2, but lora_ids has 3"),
    R(
        "sgmv_shrink",
        "lora_grouped_offsets",
        ints(0, 5),
        "lora_grouped_offsets has groups = 1, but",
    ),
    R("sgmv_shrink", "lora_grouped_offsets", ints(), "lora_grouped_offsets must have at least one"),
    R("sgmv_shrink", "slot_ranks", ints(8, 8), r"slot_ranks must have shape \[3\], got \(2,\)"),
    R("sgmv_shrink", "slot_ranks", [8, 8, 8], r"slot_ranks must be an array \[3\], got list", T),
    R("sgmv_expand", "bias", [[1.0]], r"bias must be an array \[3 32\], got list", T),
    R("sgmv_expand", "add_to", [[1.0]], r"add_to must be an array \[5 32\], got list", T),
    R("sgmv_expand", "h", ones(5, 9), "lora_b has max_lora_rank = 8, but h has 9"),
    R("sgmv_expand", "bias", ones(3, 31), r"bias must have shape \[3, 32\], got \(3, 31\)"),
    R("sgmv_expand", "add_to", ones(4, 32), r"add_to must have shape \[5, 32\], got \(4, 32\)"),
    R("sgmv_lora", "lora_b", ones(2, 32, 8), "lora_b has max_num_loras = 2, but lora_a has 3"),
    R("sgmv_qkv_lora", "lora_a", [1, 2], r"lora_a must have three arrays \(q, k, v\), got 2"),
    R("sgmv_qkv_lora", "lora_b", [ones(3, 64, 8)] * 2, "lora_b must have three arrays .*, got 2"),
    R("sgmv_qkv_lora", "bias", (), "bias must have three arrays .*, got 0"),
    R("sgmv_qkv_lora", "slot_ranks", [None], "slot_ranks must have three arrays .*, got 1"),
    R("sgmv_qkv_lora", "bias", [None] * 4, "bias must have three arrays .*, got 4"),
    R(
        "sgmv_qkv_lora",
        "lora_b",
        last(ones(3, 31, 8)),
        "lora_b of v must have .*= 32 outputs, got 31",
    ),
    R("store_kv", "v", ones(5, 3, 16), "v has n_kv_heads = 3, but k has 2"),
    R("store_kv", "k", ones(4, 2, 16), "v has total_tokens = 5, but k has 4"),
    R("store_kv", "kv.blocks", ones(3, 1, 2, 4, 2, 16), r"blocks must have shape \[num_pages, 2, "),
    R("store_kv", "kv.blocks", ones(3, 2, 2, 4, 2, 8), "blocks has head_dim = 8, but k has 16"),
    R(
        "attention_ragged",
        "kv.cache_lengths",
        ints(1, 2, 3),
        "lookup_table has cached_sequences = 2",
    ),
    R(
        "attention_ragged",
        "input_row_offsets",
        ints(0, 5),
        "input_row_offsets has 1 sequences from",
    ),
    R(
        "attention_ragged",
        "q",
        ones(5, 3, 16),
        "q must have a multiple of n_kv_heads = 2 heads, got 3",
    ),
    # Options of attention.
    R("attention_ragged", "scale", "0.5", "scale must be a number, got str", T),
    R(
        "attention_ragged",
        "window",
        4,
        r"window must be None or a pair \(left, right\), got int",
        T,
    ),
    R("attention_ragged", "window", "44", "window must be None or a pair .*, got str", T),
    R("attention_ragged", "window", (4,), r"window must be a pair \(left, right\), got 1 values"),
    R("attention_ragged", "window", (4, 0, 0), "window must be a pair .*, got 3 values"),
    R("attention_ragged", "window", (-1, 0), "window must not be negative, got -1 on the left"),
    R("attention_ragged", "window", (0, -2), "window must not be negative, got -2 on the right"),
    R("attention_ragged", "window", (4.0, 0), "window must have integers or None, got float on", T),
    R(
        "attention_ragged",
        "window",
        (None, True),
        "window must have integers .*bool on the right",
        T,
    ),
    R("attention_ragged", "soft_cap", 0.0, "soft_cap must be None or positive and finite, .*0.0"),
    R("attention_ragged", "soft_cap", -1, "soft_cap must be None or positive and finite, .*-1"),
    R("attention_ragged", "soft_cap", float("inf"), "soft_cap must be .* finite, .*inf"),
    R("attention_ragged", "soft_cap", float("nan"), "soft_cap must be .* finite, .*nan"),
    R("attention_ragged", "soft_cap", 1e-39, "soft_cap must be .* from 2\\*\\*-126 to .*1e-39"),
    R("attention_ragged", "soft_cap", True, "soft_cap must be a number, got bool", T),
    R("attention_ragged", "soft_cap", "3", "soft_cap must be a number, got str", T),
    R("attention_ragged", "sinks", [0.0] * 4, r"sinks must be an array \[4\], got list", T),
    R("attention_ragged", "sinks", ones(3), r"sinks must have shape \[4\], got \(3,\)"),
    R("attention_ragged", "sinks", ones(4, 1), r"sinks must have shape \[4\], got \(4, 1\)"),
    R("attention_ragged", "sinks", in_type(np.float16), "sinks must be float32, got float16", T),
    R("attention_ragged", "sinks", in_type(np.int32), "sinks must be float32, got int32", T),
    R("attention_ragged", "sinks", ones(8)[::2], "sinks must be C-contiguous, got strides"),
    R(
        "attention_ragged",
        "sinks",
        emulator.asarray,
        "sinks must be on the CPU as q is, got the",
        T,
    ),
    R("rope_ragged", "freqs_cis", ones(8, 15), "freqs_cis must have an even number .*= 16, got 15"),
    R("rope_ragged", "freqs_cis", ones(8, 18), "freqs_cis must have an even number .*= 16, got 18"),
    R("rope_ragged", "freqs_cis", ones(8, 0), "freqs_cis must have an even number .*= 16, got 0"),
    R("rope_store_kv", "k", ones(5, 3, 16), "v has n_kv_heads = 2, but k has 3"),
    R("rope_store_kv", "k", ones(4, 2, 16), "k has total_tokens = 4, but q has 5"),
    R("rope_store_kv", "v", ones(5, 2, 8), "v has head_dim = 8, but q has 16"),
    R("rope_store_kv", "freqs_cis", ones(8, 15), "freqs_cis must have an even .*= 16, got 15"),
    R("linear", "weight", ones(7, 25), "weight has in_dim = 25, but x has 24"),
    R("linear", "bias", ones(8), "bias has out_dim = 8, but weight has 7"),
    # Dtypes: what is stored, what agrees, metadata.
    R("sgmv_shrink", "x", in_type(np.float64), "x must be float32 or float16 or bfloat16, got", T),
    R("sgmv_shrink", "lora_a", in_type(bfloat16), "lora_a must be float32, got bfloat16", T),
    R("sgmv_shrink", "lora_ids", in_type(np.int64), "lora_ids must be int32, got int64", T),
    R("sgmv_shrink", "lora_ranks", in_type(np.int64), "lora_ranks must be uint32 or int32, got", T),
    R("sgmv_shrink", "slot_ranks", in_type(np.uint32), "slot_ranks must be int32, got uint32", T),
    R("sgmv_shrink", "lora_grouped_offsets", in_type(np.int64), "lora_grouped_offsets must be", T),
    R("sgmv_expand", "h", in_type(np.float16), "h must be float32, got float16", T),
    R("sgmv_expand", "lora_b", in_type(np.int32), "lora_b must be float32 or .*, got int32", T),
    R("sgmv_expand", "bias", in_type(np.float16), "bias must be float32, got float16", T),
    R("sgmv_expand", "add_to", in_type(bfloat16), "add_to must be float32 or .*, got bfloat16", T),
    R("sgmv_lora", "lora_b", in_type(np.float16), "lora_b must be float32, got float16", T),
    R("sgmv_qkv_lora", "kv.blocks", in_type(np.float16), "blocks must be float32, got float16", T),
    R("store_kv", "k", in_type(np.float16), "k must be float32, got float16", T),
    R(
        "store_kv",
        "kv.blocks",
        ones(9, 2, 2, 4, 2, 16, dtype=np.uint8),
        "blocks must be float32 or .*, got uint8",
        T,
    ),
    R(
        "store_kv",
        "kv.cache_lengths",
        in_type(np.int64),
        "cache_lengths must be uint32 or int32",
        T,
    ),
    R("store_kv", "kv.lookup_table", in_type(np.int64), "lookup_table must be uint32 or int32", T),
    R("store_kv", "input_row_offsets", in_type(np.int64), "input_row_offsets must be uint32 or", T),
    R("add_kv", "v", in_type(bfloat16), "v must be float32.*, got bfloat16", T),
    R("rope_ragged", "q", in_type(bfloat16), "q must be float32, got bfloat16", T),
    R("rope_ragged", "freqs_cis", in_type(np.float64), "freqs_cis must be float32, got float64", T),
    R("rope_store_kv", "q", in_type(np.float16), "q must be float32, got float16", T),
    R("rope_store_kv", "k", in_type(bfloat16), "k must be float32, got bfloat16", T),
    R("rope_store_kv", "v", in_type(np.float16), "v must be float32, got float16", T),
    R("rope_store_kv", "freqs_cis", in_type(np.float64), "freqs_cis must be float32, got fl", T),
    R("attention_ragged", "q", in_type(np.float16), "q must be float32, got float16", T),
    R("linear", "weight", in_type(np.float16), "weight must be float32, got float16", T),
    R("linear", "x", in_type(np.float64), "x must be float32 or float16 or bfloat16, got", T),
    # Memory layout: views are refused, not copied.
    R("sgmv_shrink", "x", fortran, "x must be C-contiguous, got strides"),
    R("sgmv_shrink", "lora_ids", lambda a: a.repeat(2)[::2], "lora_ids must be C-contiguous"),
    R("sgmv_expand", "h", fortran, "h must be C-contiguous, got strides"),
    R("sgmv_expand", "bias", fortran, "bias must be C-contiguous, got strides"),
    R("sgmv_expand", "add_to", fortran, "add_to must be C-contiguous within a row, got strides"),
    R("sgmv_expand", "add_to", lambda a: a[::-1], "add_to must have rows in ascending order, got"),
    R("sgmv_expand", "add_to", one_row, r"add_to must have rows that do not overlap, got strides"),
    R("store_kv", "k", lambda a: a.swapaxes(1, 2).copy().swapaxes(1, 2), "k must be C-contiguous"),
    R("store_kv", "v", row_gaps, "v must start each row at a multiple of 16 bytes, got address"),
    R("store_kv", "kv.blocks", fortran, "blocks must be C-contiguous, got strides"),
    R("store_kv", "kv.lookup_table", fortran, "lookup_table must be C-contiguous, got strides"),
    R("rope_ragged", "q", off_by_4, "q must start each row at a multiple of 16 bytes, got address"),
    R("rope_ragged", "freqs_cis", lambda a: a[::2], "freqs_cis must be C-contiguous, got strides"),
    R("rope_store_kv", "q", row_gaps, "q must start each row at a multiple of 16 bytes, got"),
    R("rope_store_kv", "k", off_by_4, "k must start each row at a multiple of 16 bytes, got"),
    R("rope_store_kv", "v", lambda a: a[::-1], "v must have rows in ascending order, got strides"),
    R("rope_store_kv", "freqs_cis", lambda a: a[::2], "freqs_cis must be C-contiguous, got"),
    R("attention_ragged", "q", row_gaps, "q must start each row at a multiple of 16 bytes, got"),
    # Devices.
    R(
        "sgmv_shrink",
        "lora_a",
        emulator.asarray,
        "lora_a must be on the CPU as x is, got the emul",
        T,
    ),
    R(
        "sgmv_shrink",
        "lora_ids",
        emulator.asarray,
        "lora_ids must be on the CPU or on the CPU, got",
        T,
    ),
    R(
        "sgmv_lora",
        "lora_b",
        emulator.asarray,
        "lora_b must be on the CPU as x is, got the emul",
        T,
    ),
    R("sgmv_expand", "h", emulator.asarray, "lora_b must be on the emulator as h is, got the", T),
    R("linear", "weight", Unknown, "weight: expected a NumPy or CuPy array, got .*Unknown", T),
    R("sgmv_lora", "lora_ids", Unknown, "lora_ids: expected a NumPy or CuPy array, got", T),
    R("sgmv_expand", "add_to", emulator.asarray, "add_to must be on the CPU as lora_b is, got", T),
    R("store_kv", "v", emulator.asarray, "v must be on the CPU as blocks is, got the emulator", T),
    R("rope_ragged", "freqs_cis", emulator.asarray, "freqs_cis must be on the CPU as blocks is", T),
    R("rope_store_kv", "k", emulator.asarray, "k must be on the CPU as blocks is, got the emu", T),
    R("rope_store_kv", "v", emulator.asarray, "v must be on the CPU as blocks is, got the emu", T),
    R(
        "attention_ragged",
        "kv.lookup_table",
        emulator.asarray,
        "lookup_table must be on the CPU or",
        T,
    ),
    R(
        "linear",
        "weight",
        emulator.asarray,
        "weight must be on the CPU as x is, got the emulator",
        T,
    ),
    # Values of metadata on the host.
    R("sgmv_shrink", "lora_ids", ints(0, -1, 3), "lora_ids must be below max_num_loras = 3, got 3"),
    R("sgmv_shrink", "lora_ranks", ints(8, -2, 4), "lora_ranks must not be negative, got -2"),
    R("sgmv_shrink", "slot_ranks", ints(8, -1, 4), "slot_ranks must not be negative, got -1"),
    R(
        "sgmv_lora",
        "lora_grouped_offsets",
        ints(1, 2, 3, 5),
        "lora_grouped_offsets must start at 0",
    ),
    R("sgmv_lora", "lora_grouped_offsets", ints(0, 3, 2, 5), "must not decrease, got 3 before 2"),
    R("sgmv_lora", "lora_grouped_offsets", ints(0, 2, 3, 6), "must end at most 5, the .*, got 6"),
    R("store_kv", "input_row_offsets", ints(1, 2, 5), "input_row_offsets must start at 0, got 1"),
    R("store_kv", "input_row_offsets", ints(0, 6, 5), "must not decrease, got 6 before 5"),
    R("store_kv", "input_row_offsets", ints(0, 2, 4), "input_row_offsets must end at 5, .*, got 4"),
    R("store_kv", "layer_idx", 2, r"layer_idx must be in \[0, 2\), got 2"),
    R("store_kv", "layer_idx", 1.0, "layer_idx must be an integer, got float", T),
    R("rope_ragged", "layer_idx", -1, r"layer_idx must be in \[0, 2\), got -1"),
    R("add_kv", "batch_offset", 1, "2 sequences from batch_offset = 1 on, but cache_lengths has 2"),
    R(
        "add_kv",
        "batch_offset",
        -1,
        "2 sequences from batch_offset = -1 on, but cache_lengths has 2",
    ),
    R("store_kv", "kv.cache_lengths", ints(3, -1), "cache_lengths must not be negative, got -1"),
    R(
        "store_kv",
        "kv.cache_lengths",
        ints(3, 40),
        "lookup_table must have 11 pages for the 43 tokens",
    ),
    R(
        "store_kv",
        "kv.lookup_table",
        ints(0, 99, 1, 2).reshape(2, 2),
        "pages in .*sequence 0, got 99",
    ),
    R("attention_ragged", "kv.lookup_table", ints(0, 1, -1, 2).reshape(2, 2), "sequence 1, got -1"),
    R(
        "rope_ragged",
        "freqs_cis",
        ones(4, 16),
        "freqs_cis must have a row for each of 5 pos.*, got 4",
    ),
    R("rope_store_kv", "freqs_cis", ones(4, 16), "freqs_cis must have a row for each of 5 pos.* 4"),
    R("rope_store_kv", "kv.lookup_table", ints(0, 99, 1, 2).reshape(2, 2), "sequence 0, got 99"),
    R("rope_store_kv", "layer_idx", -1, r"layer_idx must be in \[0, 2\), got -1"),
    # What no kernel covers.
    R("store_kv", "kv.blocks", ones(3, 2, 2, 0, 2, 16), "page_size must be at least 1, got 0"),
)


@pytest.mark.parametrize(
    "case", REFUSALS, ids=lambda case: f"{case.op}-{case.argument}-{case.message}"
)
def test_refusal(case: Refusal) -> None:
    arguments = good(case.op)
    cache: Any = arguments.get("kv_collection")
    name = case.argument.removeprefix("kv.")
    if name != case.argument:
        value = case.damage(getattr(cache, name)) if callable(case.damage) else case.damage
        cache = arguments["kv_collection"] = replace(cache, **{name: value})
    else:
        value = case.damage(arguments[name]) if callable(case.damage) else case.damage
        arguments[name] = value
    added = arguments.get("add_to")
    added = added if isinstance(added, list) else [added]
    writable = [a for a in (cache and cache.blocks, *added) if isinstance(a, np.ndarray)]
    before = [array.copy() for array in writable]
    with pytest.raises(case.error, match=case.message):
        getattr(ops, case.op)(**arguments)
    for array, copy in zip(writable, before, strict=True):
        assert_bitwise_equal(array, copy)


@pytest.mark.parametrize("op", [name for name in ops.__all__ if name.islower()])
def test_the_undamaged_call_is_accepted(op: str) -> None:
    """So that each refusal above is due to its damage; the call also writes something."""
    arguments = good(op)
    cache: Any = arguments.get("kv_collection")
    before: Any = cache and cache.blocks.copy()
    result = getattr(ops, op)(**arguments)
    if op in ("store_kv", "add_kv", "rope_ragged", "rope_store_kv", "sgmv_qkv_lora"):
        assert (before.view(np.uint32) != cache.blocks.view(np.uint32)).any()
    if op == "sgmv_route":
        assert isinstance(result, ops.LoRARoute)
    elif op not in ("store_kv", "add_kv"):
        results = result if isinstance(result, tuple) else (result,)
        assert all(np.abs(array).max() > 0 for array in results)


@pytest.mark.parametrize("head_dim", [4, 12, 264])
@pytest.mark.parametrize(
    "op", ["store_kv", "add_kv", "rope_ragged", "rope_store_kv", "attention_ragged"]
)
def test_head_dims_without_a_kernel(op: str, head_dim: int) -> None:
    arguments = good(op)
    for name in {"q", "k", "v"} & arguments.keys():
        arguments[name] = ones(ROWS, arguments[name].shape[1], head_dim)
    cache = arguments["kv_collection"]
    shape = (*cache.blocks.shape[:-1], head_dim)
    arguments["kv_collection"] = replace(cache, blocks=ones(*shape))
    with pytest.raises(
        ValueError, match=f"head_dim must be a multiple of 8 up to 256, got {head_dim}"
    ):
        getattr(ops, op)(**arguments)


def test_more_rows_than_32_bits_count() -> None:
    arguments = good("attention_ragged")
    cache = arguments["kv_collection"]
    group = arguments["q"].shape[1] // cache.blocks.shape[4]
    assert group > 1
    tokens = 2**31 // group
    pages = list(cache.blocks.shape)
    pages[3] = tokens
    blocks = np.lib.stride_tricks.as_strided(cache.blocks, pages, writeable=False)
    arguments["kv_collection"] = replace(cache, blocks=blocks)  # only its shape is looked at
    arguments["q"] = np.broadcast_to(arguments["q"][:1], (tokens, *arguments["q"].shape[1:]))
    arguments["input_row_offsets"] = ints(*arguments["input_row_offsets"][:-1], tokens)
    with pytest.raises(
        ValueError, match=f"less than 2\\^31 rows per key head, got {tokens} tokens"
    ):
        ops.attention_ragged(**arguments)


@pytest.mark.parametrize(
    "op",
    ["store_kv", "add_kv", "rope_ragged", "rope_store_kv", "attention_ragged", "sgmv_qkv_lora"],
)
def test_no_cache(op: str) -> None:
    with pytest.raises(
        TypeError,
        match="kv_collection must be a PagedKVCacheCollection or PagedKVCacheLayers, got None",
    ):
        getattr(ops, op)(**(good(op) | {"kv_collection": None}))


def test_a_batch_offset_is_an_integer() -> None:
    with pytest.raises(TypeError, match="batch_offset must be an integer, got float"):
        ops.add_kv(**(good("add_kv") | {"batch_offset": 1.0}))


def test_an_empty_rotary_table() -> None:
    """Positions on a device cannot be checked, but there must be a row to clamp them to."""
    arguments = good("rope_ragged")
    arguments["freqs_cis"] = ones(0, 16)
    arguments["q"], arguments["input_row_offsets"] = ones(0, 4, 16), ints(0, 0, 0)
    with pytest.raises(ValueError, match="freqs_cis must have a row for each position, got none"):
        ops.rope_ragged(**arguments)


def test_entries_of_the_table_past_a_sequence_are_not_looked_at() -> None:
    arguments = good("store_kv")
    table = arguments["kv_collection"].lookup_table
    table[0, 2:] = table[1, 1:] = 2**32 - 1
    ops.store_kv(**arguments)


def test_offsets_may_end_before_the_last_row_only_for_adapters() -> None:
    arguments = good("sgmv_lora")
    arguments["lora_grouped_offsets"] = ints(0, 1, 2, 3)
    arguments["add_to"] = None
    assert not ops.sgmv_lora(**arguments)[3:].any()
