"""What dispatch can choose, and what a block of it needs."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import ops, testing, tiles
from lorakit.dtypes import STORAGE, bfloat16
from tests.conftest import KernelDevice
from tests.emulator import EmulatorError

INSTANCES = tiles.instances()
SHARED = [instance for instance in INSTANCES if instance.shared_bytes]
MOST_SHARED_BYTES = 227 * 1024  # of a block on sm_90
DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "__half": np.dtype(np.float16),
    "__nv_bfloat16": bfloat16,
}


def short(instance: tiles.Instance) -> str:
    return instance.name.removeprefix("lorakit::").replace(" ", "")


# ---- Dispatch cannot leave the list ------------------------------------------------------------------

dtypes = st.sampled_from(STORAGE)
deltas = dtypes.flatmap(lambda t: st.tuples(st.just(t), st.sampled_from((t, STORAGE[0]))))
heads = st.integers(1, 32).map(lambda eighths: 8 * eighths)
rotations = heads.flatmap(
    lambda dim: st.tuples(st.just(dim), st.integers(1, dim // 2).map(lambda pairs: 2 * pairs))
)

item_rows = st.builds(tiles.sgmv_item_rows, st.integers(1, 2**20), st.integers(1, 2**20))

# Every size that an op lets through to its chooser.
CHOICES: dict[str, st.SearchStrategy[tiles.Instance]] = {
    "sgmv_route_items": st.builds(tiles.sgmv_route_items),
    "sgmv_route_rows": st.builds(tiles.sgmv_route_rows),
    "sgmv_shrink": st.builds(
        tiles.sgmv_shrink,
        dtypes,
        st.integers(1, 2**20),
        item_rows,
        st.booleans(),
        st.booleans(),
    ),
    "sgmv_expand": st.builds(
        lambda pair, *sizes: tiles.sgmv_expand(*pair, *sizes),
        deltas,
        st.integers(1, 2**20),
        item_rows,
        st.booleans(),
        st.integers(tiles.LEAST_SHARED_BYTES, 2**20),
    ),
    "rope_ragged": st.builds(
        lambda dtype, dims, order: tiles.rope_ragged(dtype, *dims, order),
        dtypes,
        rotations,
        st.booleans(),
    ),
    "rope_store_kv": st.builds(
        lambda dtype, dims, order: tiles.rope_store_kv(dtype, *dims, order),
        dtypes,
        rotations,
        st.booleans(),
    ),
    "store_kv": st.builds(tiles.store_kv, dtypes),
    "add_kv": deltas.map(lambda pair: tiles.add_kv(*pair)),
    "attention_ragged": st.builds(tiles.attention_ragged, dtypes, heads),
    "attention_decode": st.builds(tiles.attention_decode, dtypes, heads, st.integers(1, 99)),
    "attention_merge": st.builds(tiles.attention_merge, dtypes, heads),
}


@pytest.mark.parametrize("chooser", CHOICES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_dispatch_stays_in_the_list(chooser: str, data: st.DataObject) -> None:
    assert data.draw(CHOICES[chooser]) in INSTANCES


def test_every_chooser_is_tested() -> None:
    choosers = {
        name
        for name, function in vars(tiles).items()
        if callable(function)
        and not name.startswith("_")
        and not inspect.isclass(function)
        and inspect.signature(function).return_annotation == "Instance"
    }
    assert choosers == set(CHOICES)


def test_the_list_holds_nothing_else() -> None:
    """Every instance is chosen for some size, so that the gate compiles nothing in vain."""
    dims = range(8, 257, 8)
    item_rows = {tiles.sgmv_item_rows(rows, 9) for rows in (1, 127, 128, 2048, 4095, 4096, 10**6)}
    chosen = {
        tiles.sgmv_route_items(),
        tiles.sgmv_route_rows(),
        *(
            tiles.sgmv_shrink(t, blocks, m, a, few)
            for t in STORAGE
            for blocks in range(1, 20)
            for m in item_rows
            for a in (True, False)
            for few in (True, False)
        ),
        *(
            tiles.sgmv_expand(t, out, rank, m, a, shared_bytes)
            for t in STORAGE
            for out in (t, STORAGE[0])
            for rank in (1, 16, 17, 128, 129, 512)
            for m in item_rows
            for a in (True, False)
            for shared_bytes in (tiles.LEAST_SHARED_BYTES, MOST_SHARED_BYTES)
        ),
        *(
            choose(t, dim, rotary, order)
            for choose in (tiles.rope_ragged, tiles.rope_store_kv)
            for t in STORAGE
            for dim in dims
            for rotary in range(2, dim + 1, 2)
            for order in (True, False)
        ),
        *(tiles.store_kv(t) for t in STORAGE),
        *(tiles.add_kv(t, out) for t in STORAGE for out in (t, STORAGE[0])),
        *(tiles.attention_ragged(t, dim) for t in STORAGE for dim in dims),
        *(
            tiles.attention_decode(t, dim, rows)
            for t in STORAGE
            for dim in dims
            for rows in (1, 8, 9, 32)
        ),
        *(tiles.attention_merge(t, dim) for t in STORAGE for dim in dims),
    }
    assert set(INSTANCES) == chosen


def test_instances_are_unique() -> None:
    """One name is one kernel, with one block size and one size of shared memory."""
    counts = Counter(instance.name for instance in INSTANCES)
    assert {name: count for name, count in counts.items() if count > 1} == {}


def test_name() -> None:
    instance = tiles.sgmv_shrink(np.float16, 2, 16, True)
    assert instance.name == "lorakit::sgmv_shrink_kernel<__half, 2, 2, true>"
    assert tiles.sgmv_route_items().name == "lorakit::sgmv_route_items_kernel"


# ---- Limits of a block ---------------------------------------------------------------------------------


@pytest.mark.parametrize("instance", INSTANCES, ids=short)
def test_limits(instance: tiles.Instance) -> None:
    """What needs more shared memory than every GPU has is chosen only where a block may have it."""
    more = instance.kernel == "sgmv_expand_long_kernel" and instance.params[2] == "2"
    assert 0 <= instance.shared_bytes <= (MOST_SHARED_BYTES if more else tiles.LEAST_SHARED_BYTES)
    assert 32 <= instance.threads <= 1024
    assert instance.threads % 32 == 0


def test_numbers_that_ops_read_from_a_name() -> None:
    assert tiles.sgmv_shrink_tile(tiles.sgmv_shrink(np.float32, 9, 64, True)) == (8, 1)
    assert tiles.sgmv_shrink_tile(tiles.sgmv_shrink(np.float16, 2, 16, True)) == (16, 1)
    assert tiles.sgmv_shrink_tile(tiles.sgmv_shrink(np.float16, 2, 64, False)) == (8, 1)
    assert tiles.sgmv_item_rows(127, 127) == tiles.sgmv_item_rows(1, 1) == 8
    assert tiles.sgmv_item_rows(128, 1) == tiles.sgmv_item_rows(2048, 33) == 16
    assert tiles.sgmv_item_rows(2048, 32) == tiles.sgmv_item_rows(4095, 1) == 64
    assert tiles.sgmv_item_rows(4096, 33) == tiles.sgmv_item_rows(4096, 64) == 64
    assert tiles.sgmv_item_rows(4096, 32) == tiles.sgmv_item_rows(10**6, 4096) == 128
    assert tiles.sgmv_item_rows(2047, 1) == 16
    stages = {few: tiles.sgmv_shrink(np.float16, 1, 16, True, few).params[2] for few in (0, 1)}
    assert stages == {0: "2", 1: "4"}
    assert tiles.sgmv_is_few(10, 16, 4)
    assert not tiles.sgmv_is_few(11, 16, 4)
    assert tiles.rope_pairs(tiles.rope_ragged(np.float16, 128, 128, True)) == 8
    assert tiles.rope_pairs(tiles.rope_ragged(np.float16, 24, 24, True)) == 4
    assert tiles.rope_pairs(tiles.rope_ragged(np.float16, 24, 6, True)) == 1
    assert tiles.rope_pairs(tiles.rope_store_kv(np.float16, 24, 24, True)) == 4
    assert tiles.attention_block_m(tiles.attention_ragged(np.float16, 128)) == 128
    assert tiles.attention_block_m(tiles.attention_ragged(np.float32, 128)) == 64


@given(st.integers(1, 2**20), st.integers(1, 2**20), st.integers(1, tiles.ROPE_STORE_THREADS))
def test_passes_of_rope_store(tokens: int, heads: int, pass_heads: int) -> None:
    """All heads have a block, none has more passes than fit, and no block is without heads."""
    passes, blocks = tiles.rope_store_passes(tokens, heads, pass_heads)
    assert 1 <= passes <= tiles.ROPE_STORE_PASSES
    assert (blocks - 1) * passes * pass_heads < heads <= blocks * passes * pass_heads


def test_passes_of_rope_store_of_llama() -> None:
    """32 + 8 + 8 heads, 16 a pass: three blocks for each of a few tokens, else one; 80 heads: two."""
    assert tiles.rope_store_passes(64, 48, 16) == (1, 3)
    assert tiles.rope_store_passes(tiles.ROPE_STORE_FEW_TOKENS, 48, 16) == (1, 3)
    assert tiles.rope_store_passes(tiles.ROPE_STORE_FEW_TOKENS + 1, 48, 16) == (3, 1)
    assert tiles.rope_store_passes(8192, 80, 16) == (3, 2)


@pytest.mark.parametrize(
    ("rank_blocks", "item_rows", "rows", "blocks"),
    [
        (1, 64, 64, 1),
        (3, 128, 64, 3),
        (4, 128, 128, 4),
        (4, 64, 64, 4),
        (5, 128, 128, 6),
        (8, 128, 128, 8),
        (9, 64, 64, 6),
        (16, 128, 128, 8),
        (17, 128, 128, 6),
        (96, 128, 128, 8),
    ],
)
def test_tiles_of_long_segments(rank_blocks: int, item_rows: int, rows: int, blocks: int) -> None:
    """All ranks in one tile, or in tiles of up to 128 ranks as even as can be."""
    instance = tiles.sgmv_shrink(bfloat16, rank_blocks, item_rows, True)
    assert instance.kernel == "sgmv_shrink_long_kernel"
    assert tiles.sgmv_shrink_tile(instance) == (rows, blocks)


@pytest.mark.parametrize(
    ("resident", "blocks", "parts", "groups"),
    [
        (132, 64, 4, 2),
        (132, 128, 4, 1),
        (132, 1, 4, 4),
        (132, 500, 4, 1),
        (264, 64, 4, 4),
        (264, 64, 8, 4),
        (264, 64, 9, 9),
        (528, 100, 8, 4),
        (528, 150, 8, 3),
        (528, 1000, 8, 1),
    ],
)
def test_groups_of_parts(resident: int, blocks: int, parts: int, groups: int) -> None:
    assert tiles.sgmv_shrink_groups(blocks, parts, resident) == groups


@pytest.mark.parametrize(
    ("rank", "item_rows", "shared_bytes", "params"),
    [
        (17, 64, 227, "1 8"),
        (17, 128, 227, "2 8"),
        (128, 128, 227, "2 8"),
        (129, 128, 227, "2 16"),
        (512, 128, 227, "2 16"),
        (129, 128, 225, "2 8"),
        (17, 128, 162, "2 8"),
        (17, 128, 161, "1 8"),
        (129, 128, 99, "1 8"),
        (512, 64, 227, "1 8"),
    ],
)
def test_expand_takes_what_shared_memory_has_room_for(
    rank: int, item_rows: int, shared_bytes: int, params: str
) -> None:
    instance = tiles.sgmv_expand(bfloat16, bfloat16, rank, item_rows, True, shared_bytes * 1024)
    assert instance.kernel == "sgmv_expand_long_kernel"
    assert " ".join(instance.params[2:]) == params
    assert tiles.sgmv_expand_rows(instance) == 64 * int(params[0])


@pytest.mark.parametrize(
    ("slice_blocks", "row_tiles", "units"),
    [((56, 56), 64, 28), ((16, 4, 4), 32, 8), ((3,), 1, 1), ((112,), 48, 14), ((1, 1), 500, 1)],
)
def test_units_of_a_run(slice_blocks: tuple[int, ...], row_tiles: int, units: int) -> None:
    """On 132 blocks: counted through, no other number of units ends earlier."""
    assert tiles.sgmv_run_units(slice_blocks, row_tiles, 132) == units

    def end(units: int) -> float:
        runs = [min(units, n - first) for n in slice_blocks for first in range(0, n, units)]
        rounds = -(-len(runs) * row_tiles // 132)
        return rounds * (max(runs) + 1.5)

    assert end(units) == min(end(n) for n in range(1, 29))


# ---- Shared memory is what the kernel takes ----------------------------------------------------------


class Recorder:
    """Launches on the emulator, of one instance with a byte of shared memory less than asked for."""

    def __init__(self, launch: Callable[..., None], short: tiles.Instance) -> None:
        self.launch, self.short = launch, short
        self.instances: list[tiles.Instance] = []

    def __call__(self, instance: tiles.Instance, grid: Sequence[int], args: Sequence[Any]) -> None:
        self.instances.append(instance)
        less = instance.shared_bytes - int(instance == self.short)
        self.launch(replace(instance, shared_bytes=less), grid, args)


@pytest.mark.parametrize("instance", SHARED, ids=short)
def test_shared_bytes(
    instance: tiles.Instance,
    kernels: KernelDevice,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """With a byte less the kernel has too little: the emulator says how much it takes."""
    if kernels.name != "emulator":
        pytest.skip("only the emulator counts what a kernel takes")
    recorder = Recorder(kernels.backend.launch, instance)
    monkeypatch.setattr(kernels.backend, "launch", recorder)
    room = max(instance.shared_bytes, tiles.LEAST_SHARED_BYTES)
    monkeypatch.setattr(kernels.backend, "shared_bytes", room)
    with pytest.raises(EmulatorError) as caught:
        call(instance, kernels, rng)
    assert recorder.instances[-1] == instance
    assert (
        f"the kernel takes {instance.shared_bytes} bytes of dynamic shared memory, "
        f"the launch gives {instance.shared_bytes - 1}"
    ) in str(caught.value)


def call(instance: tiles.Instance, kernels: KernelDevice, rng: np.random.Generator) -> None:
    """The smallest call of an op that launches the instance."""
    dtype = DTYPES[instance.params[0]]
    batch: list[Any] = [np.zeros(1, np.int32), None, testing.row_offsets([3])]

    def array(*shape: int, of: Any = dtype) -> Any:
        return kernels.asarray(rng.standard_normal(shape).astype(of))

    if instance.kernel.startswith("sgmv_shrink"):
        if instance.kernel == "sgmv_shrink_kernel":
            rank, rows = 16, 3 if instance.params[1] == "1" else 129
            if instance.params[1:3] == ("2", "2"):  # not few
                rank *= tiles.SGMV_FEW_BLOCKS // 8
            in_dim = 64 if instance.params[3] == "true" else 63
        else:
            rows, blocks = tiles.sgmv_shrink_tile(instance)
            rank, rows, in_dim = 16 * blocks, 32 * rows, 64
        batch[-1] = testing.row_offsets([rows])
        ops.sgmv_shrink(array(rows, in_dim), array(1, rank, in_dim), *batch)
    elif instance.kernel.startswith("sgmv_expand"):
        if instance.kernel == "sgmv_expand_kernel":
            rows = {"8": 3, "16": 129, "64": 2048}[instance.params[2]]
            rank, out_dim = 16, 64 if instance.params[3] == "true" else 63
        else:
            rows, out_dim = {"1": 2048, "2": 4096}[instance.params[2]], 64
            rank = 132 if instance.params[3] == "16" else 20
        batch[-1] = testing.row_offsets([rows])
        y = array(rows, out_dim, of=DTYPES[instance.params[1]])
        b = array(1, rank, out_dim).transpose(0, 2, 1)
        ops.sgmv_expand(array(rows, rank, of=np.float32), b, *batch, add_to=y)
    elif instance.source in ("attention.cu", "attention_decode.cu"):
        head_dim, tokens = int(instance.params[1]), 3 if "decode" in instance.source else 33
        cache = testing.paged_cache(
            [2], [tokens], page_size=4, n_kv_heads=1, head_dim=head_dim, dtype=dtype, rng=rng
        )
        offsets = testing.row_offsets([tokens])
        # A decode instance of 16 rows has more of them on the key head than 8.
        heads = (
            3 if instance.kernel == "attention_decode_kernel" and instance.params[2] == "16" else 1
        )
        ops.attention_ragged(array(tokens, heads, head_dim), offsets, kernels.cache(cache), 0)
    else:
        raise AssertionError(f"no call of {instance.kernel} is known here")
