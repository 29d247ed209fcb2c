"""Elements 2**31 and more from the start of an array, for each pointer and stride of each kernel.

The emulator's arrays of this size take only the memory that is touched, and of huge grids only some
blocks run there; a GPU needs the memory and runs everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorakit import jit, ops, tiles
from lorakit.nn import PagedKVCacheCollection, PagedKVCacheLayers
from lorakit.testing import assert_bitwise_equal

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

FAR = 2**31 + 64  # elements; rows this far apart are aligned
FLOAT16 = np.dtype(np.float16)
ALL_ROWS = np.array([0, 3], np.int32)  # offsets of one group of three rows
LONG = 2051  # rows that make long segments


def zeros(kernels: KernelDevice, *shape: int, dtype: Any = FLOAT16) -> Any:
    if kernels.name == "gpu":
        cupy = jit.import_cupy()
        cupy.get_default_memory_pool().free_all_blocks()
        if (
            np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize
            > cupy.cuda.Device().mem_info[0] * 0.9
        ):
            pytest.skip("needs more memory than this GPU has")
    return kernels.backend.zeros(shape, dtype)


@contextlib.contextmanager
def some_blocks(kernels: KernelDevice, first: int = 0, end: int | None = None) -> Iterator[None]:
    """On the emulator: run a grid from block `first` on, or as if it had `end` blocks along x."""
    if kernels.name == "gpu":
        yield
        return
    backend = kernels.backend
    launch = backend.launch

    def launch_some(instance: Any, grid: Any, args: Any) -> None:
        launch(instance, (min(grid[0], end or grid[0]), *grid[1:]), args)

    backend.launch, backend.first_block = launch_some, first
    try:
        yield
    finally:
        backend.first_block = 0
        del backend.launch


def integers(rng: np.random.Generator, *shape: int, dtype: Any = FLOAT16) -> Any:
    """Small integers other than 0: their sums of products are exact."""
    values = rng.integers(1, 5, shape) * rng.choice([-1, 1], shape)
    return values.astype(dtype)


# ---- Segmented LoRA products -------------------------------------------------------------------------


def test_shrink_x(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """x has more than 2**31 elements; all rows but the last three are base rows."""
    rows, in_dim = 2**14 + 3, 2**17
    x = zeros(kernels, rows, in_dim)
    a = zeros(kernels, 1, 8, in_dim)
    x_host, a_host = integers(rng, 3, 16), integers(rng, 8, 16)
    x[-3:, -16:], a[0, :, -16:] = kernels.asarray(x_host), kernels.asarray(a_host)
    metadata = (np.array([-1, 0], np.int32), None, np.array([0, rows - 3, rows], np.int32))
    with some_blocks(kernels, end=in_dim // 1024):  # all of the only item
        h = ops.sgmv_shrink(x, a, *metadata)
    assert_bitwise_equal(h[-3:], x_host.astype(np.float32) @ a_host.T.astype(np.float32))
    assert not kernels.to_host(h[:-3]).any()


@pytest.mark.parametrize(
    ("slots", "ranks", "in_dim", "far", "rows"),
    [
        (2, 3, 24, "slot", 3),
        (2, 3, 24, "slot", LONG),
        (1, 66, 24, "rank", 3),
        (1, 66, 24, "rank", LONG),
        (1, 3, 130, "column", 3),
        (1, 3, 3, "far column", 3),
        (1, 3, 130, "far column", 3),  # half a terabyte: for the emulator only
    ],
)
def test_shrink_a(
    slots: int,
    ranks: int,
    in_dim: int,
    far: str,
    rows: int,
    kernels: KernelDevice,
    rng: np.random.Generator,
) -> None:
    """Slots, ranks or columns of A lie far apart."""
    a_host, x_host = integers(rng, slots, ranks, in_dim), integers(rng, rows, in_dim)
    if far == "slot":
        a = zeros(kernels, slots, FAR)[:, : ranks * in_dim].reshape(slots, ranks, in_dim)
    elif far == "rank":
        a = zeros(kernels, ranks, 2**26)[:, :in_dim].reshape(1, ranks, in_dim)
    else:
        a = zeros(kernels, in_dim, 2**25 if far == "column" else FAR)[:, :ranks]
        a = a.reshape(in_dim, 1, ranks).transpose(1, 2, 0)
    a[...] = kernels.asarray(a_host)
    ids, offsets = np.array([slots - 1], np.int32), np.array([0, rows], np.int32)
    h = ops.sgmv_shrink(kernels.asarray(x_host), a, ids, None, offsets)
    assert_bitwise_equal(h, x_host.astype(np.float32) @ a_host[-1].T.astype(np.float32))


def test_rank_vector(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """h has more than 2**31 elements."""
    rows, stored_rank, rank = 2**16 + 3, 2**15, 5
    a_host, b_host, x_host = integers(rng, rank, 8), integers(rng, rank, 24), integers(rng, 3, 8)
    x, a, b = (
        zeros(kernels, *shape) for shape in ((rows, 8), (1, stored_rank, 8), (1, stored_rank, 24))
    )
    x[-3:], a[0, :rank], b[0, :rank] = map(kernels.asarray, (x_host, a_host, b_host))
    metadata = (np.array([-1, 0], np.int32), None, np.array([0, rows - 3, rows], np.int32))
    ranks = np.array([rank], np.int32)
    with some_blocks(kernels, end=-(-stored_rank // 48)):  # all of the only item
        h = ops.sgmv_shrink(x, a, *metadata, slot_ranks=ranks)
        y = ops.sgmv_expand(h, b.transpose(0, 2, 1), *metadata, slot_ranks=ranks)
    expected = x_host.astype(np.float32) @ a_host.T.astype(np.float32)
    assert_bitwise_equal(h[-3:, :rank], expected)
    assert_bitwise_equal(y[-3:], (expected @ b_host.astype(np.float32)).astype(FLOAT16))


@pytest.mark.parametrize(
    ("slots", "ranks", "out_dim", "far", "rows"),
    [
        (2, 3, 24, "slot", 3),
        (2, 20, 24, "slot", LONG),
        (1, 40, 24, "rank", 3),
        (1, 20, 24, "far rank", 2 * LONG),
        (1, 3, 130, "column", 3),
        (1, 3, 3, "far column", 3),
    ],
)
def test_expand_b(
    slots: int,
    ranks: int,
    out_dim: int,
    far: str,
    rows: int,
    kernels: KernelDevice,
    rng: np.random.Generator,
) -> None:
    """Slots, ranks or columns of B lie far apart."""
    b_host, h_host = (
        integers(rng, slots, ranks, out_dim),
        integers(rng, rows, ranks, dtype=np.float32),
    )
    if far == "slot":
        b = zeros(kernels, slots, FAR)[:, : ranks * out_dim].reshape(slots, ranks, out_dim)
    elif far.endswith("rank"):
        stride = 2**26 if far == "rank" else 2**28  # from one step of 16 ranks to the next: 2**32
        b = zeros(kernels, ranks, stride)[:, :out_dim].reshape(1, ranks, out_dim)
    else:
        b = zeros(kernels, out_dim, 2**25 if far == "column" else FAR)[:, :ranks]
        b = b.reshape(out_dim, 1, ranks).transpose(1, 2, 0)
    b[...] = kernels.asarray(b_host)
    y = ops.sgmv_expand(
        kernels.asarray(h_host),
        b.transpose(0, 2, 1),
        np.array([slots - 1], np.int32),
        None,
        np.array([0, rows], np.int32),
    )
    assert_bitwise_equal(y, (h_host @ b_host[-1].astype(np.float32)).astype(FLOAT16))


def test_expand_y(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """Rows of y lie far apart."""
    h_host, b_host = integers(rng, 3, 4, dtype=np.float32), integers(rng, 1, 4, 24)
    y = zeros(kernels, 3, FAR)[:, :24]
    y_host = integers(rng, 3, 24)
    y[...] = kernels.asarray(y_host)
    b = kernels.asarray(b_host).transpose(0, 2, 1)
    ops.sgmv_expand(kernels.asarray(h_host), b, np.array([0], np.int32), None, ALL_ROWS, add_to=y)
    assert_bitwise_equal(y, (y_host + h_host @ b_host[0].astype(np.float32)).astype(FLOAT16))


@pytest.mark.parametrize("ranks", [4, 20])
def test_expand_many_rows_of_y(ranks: int, kernels: KernelDevice, rng: np.random.Generator) -> None:
    """y has more than 2**32 bytes, its rows being 2**21 elements apart."""
    h_host, b_host = integers(rng, LONG, ranks, dtype=np.float32), integers(rng, 1, ranks, 24)
    y = zeros(kernels, LONG, 2**21)[:, :24]
    y_host = integers(rng, LONG, 24)
    y[...] = kernels.asarray(y_host)
    b, offsets = kernels.asarray(b_host).transpose(0, 2, 1), np.array([0, LONG], np.int32)
    ops.sgmv_expand(kernels.asarray(h_host), b, np.array([0], np.int32), None, offsets, add_to=y)
    assert_bitwise_equal(y, (y_host + h_host @ b_host[0].astype(np.float32)).astype(FLOAT16))


def test_expand_bias(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """The biases of all slots have more than 2**31 elements; one B serves all slots."""
    slots, out_dim = 2**11 + 1, 2**20
    bias, b = zeros(kernels, slots, out_dim), zeros(kernels, 1, 1, out_dim)
    bias_host = integers(rng, 128)
    bias[-1, :128] = kernels.asarray(bias_host)
    b = (
        np.broadcast_to(b, (slots, 1, out_dim), subok=True)
        if kernels.name == "emulator"
        else (jit.import_cupy().broadcast_to(b, (slots, 1, out_dim)))
    )
    h = kernels.asarray(np.ones((3, 1), np.float32))
    y = ops.sgmv_expand(
        h, b.transpose(0, 2, 1), np.array([slots - 1], np.int32), None, ALL_ROWS, bias=bias
    )
    assert_bitwise_equal(y[:, :128], np.tile(bias_host, (3, 1)))


# ---- The cache ---------------------------------------------------------------------------------------

# [pages, layers, page_size], pages of a sequence in the table.
CACHES = {
    "slots": (2**27 + 3, 1, 8, 2),  # more than 2**31 of them
    "layers": (3, 2**25 + 1, 8, 2),  # from a key to its value
    "table": (3, 1, 8, 2**30 + 8),  # entries of three sequences
}
CACHE_OPS = ("store", "add", "rope", "rope_store", "attention", "prefill")


@pytest.mark.parametrize("op", CACHE_OPS)
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
def test_cache(
    cache: tuple[int, int, int, int], op: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """The third sequence has 7 tokens cached on the last page, and this step's three on two pages."""
    num_pages, num_layers, page_size, max_pages = cache
    blocks = zeros(kernels, num_pages, 2, num_layers, page_size, 1, 16)
    table = zeros(kernels, 3, max_pages, dtype=np.uint32)
    lengths = kernels.asarray(np.array([0, 0, 7], np.uint32))
    collection = PagedKVCacheCollection(blocks, lengths, table, np.array([[3, 10]], np.uint32))
    check_cache(op, kernels, rng, collection, num_layers - 1)


@pytest.mark.parametrize("op", CACHE_OPS)
@pytest.mark.parametrize("axis", ["pages", "tokens", "heads"])
@pytest.mark.parametrize("far", ["keys", "values"])
def test_strides_of_the_cache(
    far: str, axis: str, op: str, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Pages, tokens or heads, of keys or of values, lie more than 2**31 elements and 4 GiB apart."""
    shape, at = (3, 8, 2, 16), ["pages", "tokens", "heads"].index(axis)
    inside = shape[:at] + shape[at + 1 :]
    apart = zeros(kernels, shape[at], FAR)[:, : np.prod(inside)].reshape(shape[at], *inside)
    parts = {"keys": zeros(kernels, *shape), "values": zeros(kernels, *shape)}
    parts[far] = np.moveaxis(apart, 0, at)
    assert parts[far].shape == shape
    assert parts[far].strides[at] > 2**32
    collection = PagedKVCacheLayers(
        [parts["keys"]],
        [parts["values"]],
        kernels.asarray(np.array([0, 0, 7], np.uint32)),
        zeros(kernels, 3, 2, dtype=np.uint32),
        np.array([[3, 10]], np.uint32),
    )
    check_cache(op, kernels, rng, collection, 0)


def check_cache(
    op: str, kernels: KernelDevice, rng: np.random.Generator, collection: Any, layer: int
) -> None:
    """An op on three tokens of the third sequence, which has 7 on the last page and goes on before that."""
    keys, values = collection.layer(layer)
    num_pages, page_size, heads, head_dim = keys.shape
    pages = [num_pages - 1, num_pages - 2]
    collection.lookup_table[2, :2] = kernels.asarray(np.array(pages, np.uint32))
    offsets = kernels.asarray(np.array([0, 0, 0, 3], np.int32))

    before = integers(rng, 2, 10, heads, head_dim)  # keys and values of the sequence
    places = [(pages[p // page_size], p % page_size) for p in range(10)]
    for p, (page, slot) in enumerate(places):
        for part, rows in zip((keys, values), before, strict=True):
            part[page, slot] = kernels.asarray(rows[p])
    rows = integers(rng, 3, heads, head_dim)
    new = kernels.asarray(rows)
    expected = before.astype(np.float32)
    if op == "store":
        ops.store_kv(new, new, offsets, collection, layer)
        expected[:, 7:] = rows
    elif op == "add":
        ops.add_kv(new, new, offsets, collection, layer)
        expected[:, 7:] += rows
    elif op == "rope":  # by a quarter turn: (re, im) -> (-im, re)
        turn = kernels.asarray(np.tile(np.array([0, 1], np.float32), (10, head_dim // 2)))
        ops.rope_ragged(new, offsets, collection, turn, layer)
        expected[0, 7:, :, 0::2] = -before[0, 7:, :, 1::2]
        expected[0, 7:, :, 1::2] = before[0, 7:, :, 0::2]
    elif op == "rope_store":
        turn = kernels.asarray(np.tile(np.array([0, 1], np.float32), (10, head_dim // 2)))
        ops.rope_store_kv(new, new, new, offsets, collection, turn, layer)
        expected[1, 7:] = rows
        expected[0, 7:, :, 0::2], expected[0, 7:, :, 1::2] = -rows[..., 1::2], rows[..., 0::2]
    else:  # scores of 0 or so low that their keys have no weight: averages of equal values
        group = 1 if op == "attention" else 16  # of which a kernel for many rows takes over
        row = np.zeros((3, heads * group, head_dim), FLOAT16)
        row[..., 0] = 100
        for p, (page, slot) in enumerate(places):
            keys[page, slot, :, 0] = 0.0 if p == 7 else -100.0
        out = ops.attention_ragged(kernels.asarray(row), offsets, collection, layer, scale=1.0)
        assert_bitwise_equal(out, np.tile(before[1, 7].repeat(group, axis=0), (3, 1, 1)))
        return
    for part, wanted in zip((keys, values), expected, strict=True):
        after = np.stack([kernels.to_host(part[page, slot]) for page, slot in places])
        np.testing.assert_array_equal(after.astype(np.float32), wanted)


def small_cache(kernels: KernelDevice, tokens: int, n_kv_heads: int, head_dim: int) -> Any:
    """A cache of two pages of one slot; sequence 0 is `tokens` times on page 0, sequence 1 on page 1."""
    blocks = zeros(kernels, 2, 2, 1, 1, n_kv_heads, head_dim)
    table = np.zeros((2, tokens), np.uint32)
    table[1, 0] = 1
    lengths = kernels.asarray(np.zeros(2, np.uint32))
    sizes = np.array([[tokens, tokens]], np.uint32)
    return PagedKVCacheCollection(blocks, lengths, kernels.asarray(table), sizes)


def repeated(kernels: KernelDevice, row: Any, rows: int) -> Any:
    """`rows` rows in the memory of one."""
    if kernels.name == "emulator":
        return np.broadcast_to(row, (rows, *row.shape[1:]), subok=True)
    return jit.import_cupy().broadcast_to(row, (rows, *row.shape[1:]))


@pytest.mark.parametrize("op", ["store", "add", "rope", "rope_store", "attention"])
def test_strides_of_rows(op: str, kernels: KernelDevice, rng: np.random.Generator) -> None:
    """Rows of q, k and v lie far apart."""
    q_host, k_host, v_host = (integers(rng, 2, 1, 16) for _ in range(3))
    whole = zeros(kernels, 2, FAR)
    q, k, v = (whole[:, i * 16 : i * 16 + 16].reshape(2, 1, 16) for i in range(3))
    q[...], k[...], v[...] = map(kernels.asarray, (q_host, k_host, v_host))
    collection = small_cache(kernels, 1, 1, 16)
    offsets = kernels.asarray(np.array([0, 1, 2], np.int32))
    if op == "rope":
        turn = kernels.asarray(np.array([[0, 1] * 8], np.float32))
        out = kernels.to_host(ops.rope_ragged(q, offsets, collection, turn, 0))
        np.testing.assert_array_equal(out[..., 0::2], -q_host[..., 1::2])
        np.testing.assert_array_equal(out[..., 1::2], q_host[..., 0::2])
        return
    if op == "rope_store":
        turn = kernels.asarray(np.array([[0, 1] * 8], np.float32))
        out = kernels.to_host(ops.rope_store_kv(q, k, v, offsets, collection, turn, 0))
        blocks = kernels.to_host(collection.blocks)
        for rotated, given in ((out, q_host), (blocks[:, 0, 0, 0], k_host)):
            np.testing.assert_array_equal(rotated[..., 0::2], -given[..., 1::2])
            np.testing.assert_array_equal(rotated[..., 1::2], given[..., 0::2])
        assert_bitwise_equal(blocks[:, 1, 0, 0], v_host)
        return
    if op == "attention":  # one key of weight 1 for each row; LSE is its score
        keys = np.ones((2, 2, 1, 1, 1, 16), FLOAT16)
        collection.blocks[...] = kernels.asarray(keys)
        lse = ops.attention_ragged(q, offsets, collection, 0, scale=1.0, return_lse=True)[1]
        np.testing.assert_allclose(kernels.to_host(lse), q_host.sum(axis=2), atol=1e-4)
        return
    getattr(ops, f"{op}_kv")(k, v, offsets, collection, 0)
    after = kernels.to_host(collection.blocks)
    assert_bitwise_equal(after[:, 0, 0, 0], k_host)
    assert_bitwise_equal(after[:, 1, 0, 0], v_host)


# ---- Grids -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["store", "add"])
def test_threads_of_kv(op: str, kernels: KernelDevice, rng: np.random.Generator) -> None:
    """More than 2**32 threads; the last token's are the last 2**19."""
    rows, heads, head_dim = 2**13 + 1, 2**14, 256
    row = kernels.asarray(integers(rng, 1, heads, head_dim))
    k = repeated(kernels, row, rows)
    collection = small_cache(kernels, rows - 1, heads, head_dim)
    offsets = kernels.asarray(np.array([0, rows - 1, rows], np.int32))
    with some_blocks(kernels, first=2**24):
        getattr(ops, f"{op}_kv")(k, k, offsets, collection, 0)
    assert_bitwise_equal(collection.blocks[1, 0, 0], row)
    assert_bitwise_equal(collection.blocks[1, 1, 0], row)


def test_threads_of_rope(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """More than 2**32 threads, each with one pair; the queries have 2**33 elements."""
    rows, heads, head_dim = 2**13 + 1, 2**12, 256
    row = kernels.asarray(integers(rng, 1, heads, head_dim))
    collection = small_cache(kernels, rows - 1, 1, head_dim)
    turn = kernels.asarray(np.tile(np.array([0, 1], np.float32), (rows, 1)))
    offsets = kernels.asarray(np.array([0, rows - 1, rows], np.int32))
    first = (rows - 1) * (heads + 1) * head_dim // 2 // 256
    with some_blocks(kernels, first=first):
        out = ops.rope_ragged(repeated(kernels, row, rows), offsets, collection, turn, 0)
    expected = kernels.to_host(row)
    expected[..., 0], expected[..., 1] = -expected[..., 1], expected[..., 0].copy()
    assert_bitwise_equal(out[-1:], expected)


def test_heads_of_rope(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """A row of 2**32 elements."""
    heads, head_dim = 2**24 + 8, 256
    q = zeros(kernels, 1, heads, head_dim)
    q_host = integers(rng, 8, head_dim)
    q[0, -8:] = kernels.asarray(q_host)
    collection = small_cache(kernels, 1, 1, head_dim)
    turn = kernels.asarray(np.array([[0, 1]], np.float32))
    offsets = kernels.asarray(np.array([0, 1, 1], np.int32))
    with some_blocks(kernels, first=2**24 * 128 // 256):
        out = ops.rope_ragged(q, offsets, collection, turn, 0)
    expected = q_host.copy()
    expected[:, 0], expected[:, 1] = -q_host[:, 1], q_host[:, 0]
    assert_bitwise_equal(out[0, -8:], expected)


@pytest.mark.parametrize("part", ["queries", "values"])
def test_heads_of_rope_store(part: str, kernels: KernelDevice, rng: np.random.Generator) -> None:
    """A row of 2**32 elements, and more blocks of a token than a grid has along y."""
    many, head_dim = 2**24 + 8, 256
    heads, kv_heads = (many, 1) if part == "queries" else (1, many)
    q, k, v = (zeros(kernels, 1, n, head_dim) for n in (heads, kv_heads, kv_heads))
    host = integers(rng, 8, head_dim)
    (q if part == "queries" else v)[0, -8:] = kernels.asarray(host)
    collection = small_cache(kernels, 1, kv_heads, head_dim)
    turn = kernels.asarray(np.array([[0, 1]], np.float32))
    offsets = kernels.asarray(np.array([0, 1, 1], np.int32))
    with some_blocks(kernels, first=heads + 2 * (kv_heads - 1) - 6):
        out = ops.rope_store_kv(q, k, v, offsets, collection, turn, 0)
    if part == "values":
        assert_bitwise_equal(collection.blocks[0, 1, 0, 0, -7:], host[-7:])
        return
    expected = host[-6:].copy()
    expected[:, 0], expected[:, 1] = -host[-6:, 1], host[-6:, 0]
    assert_bitwise_equal(out[0, -6:], expected)


def test_rows_of_attention(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """More than 2**31 (token, head) pairs, and 2**31 elements in a row."""
    rows, group, kv_heads, head_dim = 9, 2**13, 2**15 + 1, 8
    heads = group * kv_heads
    q = zeros(kernels, 1, heads, head_dim)
    q[0, -group:] = kernels.asarray(np.full((group, head_dim), 2, FLOAT16))
    q = repeated(kernels, q, rows)
    blocks = zeros(kernels, 1, 2, 1, 16, kv_heads, head_dim)
    values = integers(rng, rows, head_dim)
    blocks[0, 0, 0, :rows, -1] = kernels.asarray(
        np.tile(np.arange(rows)[:, None], head_dim).astype(FLOAT16)
    )
    blocks[0, 1, 0, :rows, -1] = kernels.asarray(values)
    collection = PagedKVCacheCollection(
        blocks,
        kernels.asarray(np.zeros(1, np.uint32)),
        kernels.asarray(np.zeros((1, 1), np.uint32)),
        np.array([[rows, rows]], np.uint32),
    )
    offsets = kernels.asarray(np.array([0, rows], np.int32))
    block_m = tiles.attention_block_m(tiles.attention_ragged(FLOAT16, head_dim))
    blocks_of_a_head = rows * group // block_m + 2
    with some_blocks(kernels, first=blocks_of_a_head * (kv_heads - 1)):  # its late rows come first
        out, lse = ops.attention_ragged(q, offsets, collection, 0, scale=4.0, return_lse=True)
    # The last key's score, 8 * 2 * 8 * 4, is 64 above all others.
    assert_bitwise_equal(out[-1, -group:], np.tile(values[-1], (group, 1)))
    np.testing.assert_array_equal(kernels.to_host(lse[-1, -group:]), np.float32(512))
