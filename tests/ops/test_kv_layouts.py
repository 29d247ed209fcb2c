"""Keys and values of any strides (`PagedKVCacheLayers`): the bits of the MAX layout, and what is refused.

That those are right, other tests show: test_kv_cache, test_rope, test_attention and test_sgmv_qkv.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from lorakit import jit, ops
from lorakit.dtypes import bfloat16
from lorakit.nn import PagedKVCacheCollection, PagedKVCacheLayers
from lorakit.testing import PagedCache, adapters, assert_bitwise_equal, rotary_table, to_host
from tests.emulator import emulator
from tests.ops.helpers import FLOAT16, FLOAT32, CacheCase, each_dtype
from tests.ops.test_validation import Unknown, off_by_4

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

# Axes of the memory: P pages, S slots of a page, H heads, D elements, 2 keys then values, R values then keys,
# L layers. Two words are two arrays; along an axis in lower case there is more than the cache has.
LAYOUTS = {
    "max": "P2LSHD",
    "nhd": "PSHD PSHD",
    "hnd": "PHSD PHSD",
    "vllm": "2PSHD",
    "vllm_hnd": "2PHSD",
    "flashinfer": "P2SHD",
    "flashinfer_hnd": "P2HSD",
    "values_first": "RPSHD",
    "values_first_in_a_page": "PRHSD",
    "value_beside_key": "PSH2D",
    "keys_nhd_values_hnd": "PSHD PHSD",
    "gaps_and_none": "pshd SHPD",
    "layers_inside": "SLhRPD",
}
OPS = ("store", "add", "rope", "rope_store", "attention", "qkv_lora")
CASES = {
    "decode": CacheCase("", (3, 0, 11), (1, 2, 1), 5, 6, 3, 24),
    "prefill": CacheCase("", (3, 0, 11), (2, 18, 1), 5, 6, 3, 24),
}


def shapes(layout: str, cache: PagedCache) -> list[tuple[int, ...]]:
    """Of the memory's arrays."""
    pages, _, layers, slots, heads, elements = cache.blocks.shape
    sizes = {"P": pages, "S": slots, "H": heads, "D": elements, "2": 2, "R": 2, "L": layers}
    more = {"p": pages + 1, "s": slots + 2, "h": heads + 1, "d": elements + 8}
    return [tuple((sizes | more)[axis] for axis in word) for word in layout.split()]


def views(layout: str, memory: Sequence[Any], cache: PagedCache, layer_idx: int) -> tuple[Any, Any]:
    """Keys and values of a layer in the memory."""
    sizes = dict(zip("P__SHD", cache.blocks.shape, strict=True))
    words, parts = layout.split(), []
    for part in (0, 1):
        word, array = words[part % len(words)], memory[part % len(words)]
        at = {"2": part, "R": 1 - part, "L": layer_idx}
        array = array[tuple(at[a] if a in at else slice(sizes[a.upper()]) for a in word)]
        kept = [axis.upper() for axis in word if axis not in at]
        parts.append(array.transpose([kept.index(axis) for axis in "PSHD"]))
    return parts[0], parts[1]


def call(
    op: str, case: CacheCase, cache: Any, offsets: Any, place: Callable[[Any], Any], seed: int
) -> list[Any]:
    """The results of an op on random rows."""
    rng, layer = np.random.default_rng(seed), case.layer_idx
    q, k, v = (
        place(case.rows(rng, heads)) for heads in (case.n_heads, case.n_kv_heads, case.n_kv_heads)
    )
    table = place(rotary_table(40, 16))
    if op == "store":
        ops.store_kv(k, v, offsets, cache, layer)
    elif op == "add":
        ops.add_kv(k, v, offsets, cache, layer)
    elif op == "rope":
        return [ops.rope_ragged(q, offsets, cache, table, layer)]
    elif op == "rope_store":
        return [ops.rope_store_kv(q, k, v, offsets, cache, table, layer, interleaved=False)]
    elif op == "attention":
        return list(ops.attention_ragged(q, offsets, cache, layer, return_lse=True))
    else:
        modules = [
            adapters(2, 4, 40, heads * case.head_dim, case.dtype, rng)
            for heads in (case.n_heads, case.n_kv_heads, case.n_kv_heads)
        ]
        x = place(rng.standard_normal((case.total_tokens, 40)).astype(case.dtype))
        lora_a, lora_b = ([place(getattr(m, n)) for m in modules] for n in ("lora_a", "lora_b"))
        ids = place(np.array([1, -1], np.int32))
        groups = place(np.array([0, 2, case.total_tokens], np.int32))
        return [ops.sgmv_qkv_lora(x, lora_a, lora_b, ids, None, groups, offsets, cache, layer)]
    return []


def check(op: str, layout: str, case: CacheCase, place: Callable[[Any], Any], seed: int) -> None:
    """The same results as with one array of all layers, the same layer, and nothing else written."""
    given = case.cache(np.random.default_rng(seed))
    metadata = (place(given.cache_lengths), place(given.lookup_table), given.max_lengths)
    offsets = place(case.offsets())
    blocks = place(given.blocks.copy())
    whole = PagedKVCacheCollection(blocks, *metadata)
    wanted = call(op, case, whole, offsets, place, seed)

    host = [np.full(shape, np.nan, case.dtype) for shape in shapes(layout, given)]
    for view, part in zip(views(layout, host, given, case.layer_idx), (0, 1), strict=True):
        view[...] = given.blocks[:, part, case.layer_idx]
    memory = [place(array.copy()) for array in host]
    keys, values = views(layout, memory, given, case.layer_idx)
    others: list[Any] = [None] * case.layer_idx
    layers = PagedKVCacheLayers([*others, keys], [*others, values], *metadata)
    results = call(op, case, layers, offsets, place, seed)

    for result, expected in zip(results, wanted, strict=True):
        assert_bitwise_equal(result, expected, "a result")
    blocks_after = to_host(blocks)
    for view, part in zip(views(layout, host, given, case.layer_idx), (0, 1), strict=True):
        view[...] = blocks_after[:, part, case.layer_idx]
    for array, expected in zip(memory, host, strict=True):
        assert_bitwise_equal(array, expected, "the memory")
    is_changed = blocks_after.tobytes() != given.blocks.tobytes()
    assert is_changed == (op != "attention")


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_kernels(op: str, layout: str, dtype: Any, kernels: KernelDevice) -> None:
    check(op, layout, replace(CASES["decode"], dtype=dtype), kernels.asarray, len(layout))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_attention_of_many_queries(layout: str, kernels: KernelDevice) -> None:
    case = replace(CASES["prefill"], dtype=bfloat16)
    check("attention", layout, case, kernels.asarray, len(layout))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_references(op: str, layout: str) -> None:
    check(op, layout, replace(CASES["prefill"], dtype=FLOAT16), np.asarray, len(layout))


# ---- Refusals ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A right collection with ``keys`` or ``values`` damaged: the list, or in it the array of layer 1."""

    argument: str
    damage: Any
    """The new value, or a function of the old one."""
    message: str
    error: type[Exception] = ValueError


def good() -> PagedKVCacheLayers:
    """Layer 1 of CASES["decode"] in float32, heads before slots; layer 0 is no array, and nobody looks."""
    case = replace(CASES["decode"], dtype=FLOAT32)
    cache = case.cache(np.random.default_rng(0))
    keys, values = (
        np.ascontiguousarray(part.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        for part in cache.layer(1)
    )
    return PagedKVCacheLayers(
        [None, keys], [None, values], cache.cache_lengths, cache.lookup_table, cache.max_lengths
    )


def strided(axis: int, change: Callable[[int], int]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """The same shape with another stride in bytes along one axis, amid memory enough for it."""

    def damage(array: NDArray[Any]) -> NDArray[Any]:
        strides = list(array.strides)
        strides[axis] = change(strides[axis])
        memory = np.zeros(5 * array.size, array.dtype)
        return as_strided(memory[2 * array.size :], array.shape, strides)

    return damage


def in_type(dtype: Any) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda array: array.astype(dtype)


R, T = Refusal, TypeError
REFUSALS = (
    # An array for each layer, of one shape.
    R(
        "keys",
        np.zeros((2, 9, 5, 3, 24)),
        "keys must be a sequence with an array .*, got ndarray",
        T,
    ),
    R("values", None, "values must be a sequence with an array for each layer, got NoneType", T),
    R("values", [None], "values must have an array for each of 2 layers, as keys, got 1"),
    R("keys[1]", [1.0], r"keys\[1\] must be an array \[num_pages page_size .*\], got list", T),
    R("values[1]", lambda a: a[0], r"values\[1\] must have shape \[num_pages, page_size, n_kv_h"),
    R("keys[1]", lambda a: a[:-1], r"values\[1\] has num_pages = \d+, but keys\[1\] has"),
    R("values[1]", lambda a: a[:, :4], r"values\[1\] has page_size = 4, but keys\[1\] has 5"),
    R("values[1]", lambda a: a[:, :, :2], r"values\[1\] has n_kv_heads = 2, but .* has 3"),
    R("values[1]", lambda a: a[..., :8], r"values\[1\] has head_dim = 8, but .* has 24"),
    # Of one dtype, in one place.
    R("values[1]", in_type(np.float16), r"values\[1\] must be float32, got float16", T),
    R(
        "keys[1]",
        in_type(np.float64),
        r"keys\[1\] must be float32 or float16 or .*, got float64",
        T,
    ),
    R(
        "values[1]",
        emulator.asarray,
        r"values\[1\] must be on the CPU as keys\[1\] is, got the em",
        T,
    ),
    R("keys[1]", Unknown, r"keys\[1\]: expected a NumPy or CuPy array, got .*Unknown", T),
    # Of rows that lie together, at multiples of 16 bytes.
    R("keys[1]", strided(3, lambda s: 2 * s), r"keys\[1\] must be contiguous along head_dim, got"),
    R("values[1]", strided(3, lambda _: 0), r"values\[1\] must be contiguous along head_dim, got"),
    R("keys[1]", off_by_4, r"keys\[1\] must start each row at a multiple of 16 bytes, got address"),
    *(
        R(
            "values[1]",
            strided(axis, lambda s: s + 4),
            r"values\[1\] must start each row at a multi",
        )
        for axis in range(3)
    ),
    # And apart from each other.
    *(
        R("keys[1]", strided(axis, change), r"keys\[1\] must have rows that do not overlap, in asc")
        for axis in range(3)
        for change in (lambda _: 0, lambda s: -s, lambda s: s - 16)
    ),
)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: f"{case.argument}-{case.message}")
def test_refusal(case: Refusal) -> None:
    cache = good()
    arrays = cache.layer(1)
    before = [array.copy() for array in arrays]
    name, one, _ = case.argument.partition("[1]")
    value = case.damage
    if callable(value):
        value = value(getattr(cache, name)[1])
    setattr(cache, name, [None, value] if one else value)
    with pytest.raises(case.error, match=case.message):
        store(cache)
    for array, copy in zip(arrays, before, strict=True):
        assert_bitwise_equal(array, copy)


def store(cache: PagedKVCacheLayers, op: str = "store", layer_idx: Any = 1) -> None:
    case = replace(CASES["decode"], dtype=FLOAT32, layer_idx=layer_idx)
    call(op, case, cache, case.offsets(), np.asarray, 0)


def test_what_is_refused_is_right_otherwise() -> None:
    cache = good()
    before = [array.copy() for array in cache.layer(1)]
    store(cache)
    for array, copy in zip(cache.layer(1), before, strict=True):
        assert array.tobytes() != copy.tobytes()


@pytest.mark.parametrize("op", OPS)
def test_values_that_overlap_keys(op: str) -> None:
    """The same array, or from another row on; between each other they may lie."""
    cache = good()
    keys = cache.keys[1]
    words = r"keys\[1\] and values\[1\] must be arrays that do not overlap"
    for a, b in ((keys, keys), (keys[:-1], keys[1:])):
        with pytest.raises(ValueError, match=words):
            store(replace(cache, keys=[None, a], values=[None, b]), op)


@pytest.mark.parametrize(
    ("layer_idx", "error", "words"),
    [
        (2, ValueError, r"layer_idx must be in \[0, 2\), got 2"),
        (-1, ValueError, r"layer_idx must be in \[0, 2\), got -1"),
        (1.0, TypeError, "layer_idx must be an integer, got float"),
    ],
)
def test_a_layer_that_is_not_there(layer_idx: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        store(good(), layer_idx=layer_idx)


def test_strides_of_axes_of_one_element_may_be_any(kernels: KernelDevice) -> None:
    case = CacheCase("", (2, 0), (1, 1), 1, 1, 1, 24, dtype=FLOAT32)
    cache = case.cache(np.random.default_rng(0))
    rows = case.rows(np.random.default_rng(1), 1)

    def of_any_strides(array: Any) -> Any:
        strides = (array.strides[0], 3, -5, 4)
        if isinstance(array, np.ndarray):
            return as_strided(array, strides=strides, subok=True)
        return jit.import_cupy().lib.stride_tricks.as_strided(array, array.shape, strides)

    keys, values = (of_any_strides(kernels.asarray(part)) for part in cache.layer(1))
    layers = PagedKVCacheLayers(
        [None, keys], [None, values], cache.cache_lengths, cache.lookup_table, cache.max_lengths
    )
    k = kernels.asarray(rows)
    ops.store_kv(k, k, case.offsets(), layers, 1)
    for sequence, position in ((0, 2), (1, 0)):
        page = cache.lookup_table[sequence, position]
        assert_bitwise_equal(keys[page, 0], rows[sequence])
        assert_bitwise_equal(values[page, 0], rows[sequence])
