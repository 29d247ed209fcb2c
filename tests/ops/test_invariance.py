"""Batch invariance and repeatability: a row has the same bits wherever it stands, on every run.

Each test computes rows twice, in two batches that share nothing but these rows, and compares bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit import ops, tiles
from lorakit.dtypes import bfloat16
from lorakit.testing import activations, adapters, assert_bitwise_equal, rotary_table, row_offsets
from tests.ops.helpers import FLOAT16, FLOAT32, CacheCase, each_dtype, shifted

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

Groups = list[tuple[int, int]]


class Lora:
    """Two adapters on 17 and 5 rows, and the ops on any batch that contains them."""

    def __init__(self, kernels: KernelDevice, dtype: Any, rng: np.random.Generator) -> None:
        self.kernels, self.dtype, self.rng = kernels, dtype, rng
        self.rows = (17, 5)
        self.x = [activations((n, 200), dtype, rng) for n in self.rows]
        self.y = [activations((n, 72), dtype, rng) for n in self.rows]
        self.adapters = adapters(2, 70, 200, 72, dtype, rng, ranks=[70, 9])

    def run(
        self,
        batch: Groups,
        slots: tuple[int, int] = (0, 1),
        stored_rank: int = 70,
        b_rank_major: bool = True,
    ) -> dict[str, dict[int, list[NDArray[Any]]]]:
        """For each op, the results of each adapter's occurrences in a batch.

        Args:
            batch: ``(adapter, rows)``; -1 are base rows and -2 are rows of an adapter of NaN.
            slots: Where the two adapters are stored.
            stored_rank: What ranks are padded to.
        """
        kernels, made = self.kernels, self.adapters
        a = np.full((6, stored_rank, 200), np.nan, self.dtype)
        b = np.full((6, stored_rank, 72), np.nan, self.dtype)
        ranks = np.full(6, stored_rank, np.int32)
        for adapter, slot in enumerate(slots):
            rank = int(made.slot_ranks[adapter])
            a[slot, :rank] = made.lora_a[adapter, :rank]
            b[slot, :rank] = made.lora_b[adapter, :, :rank].T
            ranks[slot] = rank
        nan_slot = next(slot for slot in range(6) if slot not in slots)
        ids = np.array([{-1: -1, -2: nan_slot}.get(g, slots[g]) for g, _ in batch], np.int32)
        x = np.concatenate(
            [self.x[g][:n] if g >= 0 else np.full((n, 200), np.nan) for g, n in batch]
        )
        y = np.concatenate(
            [self.y[g][:n] if g >= 0 else np.full((n, 72), np.nan) for g, n in batch]
        )
        lora_b = kernels.asarray(b).transpose(0, 2, 1)
        if not b_rank_major:
            lora_b = kernels.asarray(b.transpose(0, 2, 1))
        metadata = (ids, None, row_offsets([n for _, n in batch]))
        options: dict[str, Any] = {"slot_ranks": ranks}
        x, a = kernels.asarray(x.astype(self.dtype)), kernels.asarray(a)
        h = ops.sgmv_shrink(x, a, *metadata, **options)
        results = {
            "shrink": h,
            "expand": ops.sgmv_expand(h, lora_b, *metadata, **options),
            "lora": ops.sgmv_lora(
                x, a, lora_b, *metadata, **options, add_to=kernels.asarray(y.astype(self.dtype))
            ),
        }
        found: dict[str, dict[int, list[NDArray[Any]]]] = {}
        for name, result in results.items():
            host = kernels.to_host(result)
            found[name] = {0: [], 1: []}
            first = 0
            for g, n in batch:
                if g >= 0:
                    width = int(made.slot_ranks[g]) if name == "shrink" else host.shape[1]
                    found[name][g].append(host[first : first + n, :width])
                first += n
        return found


@each_dtype
def test_lora_rows_in_other_batches(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    lora = Lora(kernels, dtype, rng)
    expected = lora.run([(0, 17), (1, 5)])
    others: list[tuple[Groups, dict[str, Any]]] = [
        ([(0, 17)], {}),  # alone
        ([(1, 5)], {}),
        ([(1, 5), (0, 17)], {}),  # another order
        ([(-1, 3), (0, 17), (-2, 9), (1, 5), (-1, 1)], {}),  # NaN around, other places in tiles
        ([(-2, 13), (1, 1), (1, 3), (0, 2), (-1, 20), (0, 16)], {}),  # cut short, in several groups
        ([(0, 17), (1, 5)], {"slots": (5, 2)}),  # other slots
        ([(0, 17), (1, 5)], {"stored_rank": 129}),  # the true rank counts, not the stored one
        ([(0, 17), (1, 5)], {"b_rank_major": False}),  # K-order does not depend on the layout
    ]
    for batch, options in others:
        results = lora.run(batch, **options)
        for name, by_adapter in results.items():
            for adapter, blocks in by_adapter.items():
                for block in blocks:
                    whole = expected[name][adapter][0]
                    assert np.abs(whole.astype(np.float64)).max() > 0.1
                    assert_bitwise_equal(block, whole[: len(block)], f"{name} in {batch} {options}")


@each_dtype
def test_a_small_rank_stored_at_16_and_at_more(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """The instances for ranks up to 16 and above sum in the same order."""
    made = adapters(1, 9, 200, 72, dtype, rng, ranks=[9])
    x = activations((5, 200), dtype, rng)
    results = []
    for stored in (9, 16, 17, 64):
        a = np.zeros((1, stored, 200), dtype)
        a[:, :9] = made.lora_a
        h = ops.sgmv_shrink(
            kernels.asarray(x),
            kernels.asarray(a),
            np.array([0], np.int32),
            None,
            np.array([0, 5], np.int32),
            slot_ranks=made.slot_ranks,
        )
        results.append(kernels.to_host(h)[:, :9])
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])


@pytest.mark.parametrize("dtype", [FLOAT16, bfloat16], ids=str)
@pytest.mark.parametrize(("in_dim", "y_float32"), [(64, False), (1040, True), (3080, False)])
def test_tiles_of_every_size(
    in_dim: int,
    y_float32: bool,
    dtype: Any,
    kernels: KernelDevice,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """The kernels for few rows and for long segments, whatever they have room for, give the same bits."""
    outputs, stored, slots = (264, 72, 16), (150, 40, 16), 3
    batch = [(0, 200), (-1, 3), (2, 60), (0, 40), (1, 20)]
    ids = np.array([slot for slot, _ in batch], np.int32)
    offsets = row_offsets([rows for _, rows in batch])
    x = activations((int(offsets[-1]), in_dim), dtype, rng)
    made = [
        adapters(slots, rank, in_dim, n, dtype, rng, ranks=[rank, rank // 2, rank // 3])
        for n, rank in zip(outputs, stored, strict=True)
    ]
    y = [activations((len(x), n), FLOAT32 if y_float32 else dtype, rng) for n in outputs]

    def run(item_rows: int, shared_bytes: int) -> list[NDArray[Any]]:
        monkeypatch.setattr(tiles, "sgmv_item_rows", lambda *_: item_rows)
        monkeypatch.setattr(kernels.backend, "shared_bytes", shared_bytes)
        monkeypatch.setattr(
            kernels.backend, "resident_blocks", lambda _: 25
        )  # two groups of four parts
        targets = [kernels.asarray(values) for values in y]
        ops.sgmv_lora_slices(
            kernels.asarray(x),
            [kernels.asarray(m.lora_a) for m in made],
            [kernels.asarray(m.lora_b.transpose(0, 2, 1)).transpose(0, 2, 1) for m in made],
            ids,
            None,
            offsets,
            slot_ranks=[m.slot_ranks for m in made],
            bias=[shifted(kernels, m.bias) for m in made],
            add_to=targets,
        )
        return [kernels.to_host(target) for target in targets]

    has = kernels.backend.shared_bytes // 1024
    expected = run(8, tiles.LEAST_SHARED_BYTES)
    for values, before in zip(expected, y, strict=True):
        assert (values != before).mean() > 0.5
    sizes = ((16, 99), (64, 99), (128, 99), (128, 163), (128, 227))
    for item_rows, shared_bytes in [size for size in sizes if size[1] <= has]:
        for one, other in zip(run(item_rows, shared_bytes * 1024), expected, strict=True):
            assert_bitwise_equal(one, other, f"{item_rows} rows, {shared_bytes} KiB")


CASE = CacheCase("", (40, 0, 3, 70), (1, 9, 4, 2), page_size=8)


def rearranged(case: CacheCase, cache: Any, order: list[int], rng: np.random.Generator) -> Any:
    """The sequences `order` of a cache, in this order, on other pages of a larger cache of NaN."""
    pages, width = len(cache.blocks), cache.lookup_table.shape[1]
    blocks = np.full((2 * pages, *cache.blocks.shape[1:]), np.nan, case.dtype)
    free = iter(rng.permutation(2 * pages))
    table = np.full((len(order), width + 3), 2 * pages, np.uint32)
    for to, b in enumerate(order):
        for logical in range(-(-(case.cached[b] + case.new[b]) // case.page_size)):
            table[to, logical] = next(free)
            blocks[table[to, logical]] = cache.blocks[cache.lookup_table[b, logical]]
    return replace(
        cache, blocks=blocks, lookup_table=table, cache_lengths=cache.cache_lengths[np.array(order)]
    )


def sequence_keys(case: CacheCase, blocks: Any, table: Any, row: int, b: int) -> NDArray[Any]:
    positions = np.arange(case.cached[b] + case.new[b])
    found: NDArray[Any] = blocks[
        table[row, positions // case.page_size], :, case.layer_idx, positions % case.page_size
    ]
    return found


@each_dtype
@pytest.mark.parametrize("op", ["rope", "rope_store", "attention", "add", "qkv"])
def test_a_sequence_in_other_batches(
    op: str, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Alone, in another order, with a neighbour missing, on other pages: a sequence's rows are the same."""
    case = replace(CASE, dtype=dtype)
    cache = case.cache(rng)
    starts = case.offsets().astype(int)
    rows = case.rows(rng, 8)
    adapter = adapters(1, 16, 8 * 64, 2 * 64, dtype, rng, ranks=[16])
    weights = [kernels.asarray(adapter.lora_a)] * 3, [kernels.asarray(adapter.lora_b)] * 3

    def run(order: list[int], collection: Any) -> list[tuple[NDArray[Any], ...]]:
        """For each sequence: its rows of the result, and all of its keys and values."""
        q = np.concatenate([rows[starts[b] : starts[b + 1]] for b in order])
        offsets = row_offsets([case.new[b] for b in order])
        on_device = kernels.cache(collection)
        arguments = (kernels.asarray(offsets), on_device)
        if op == "rope":
            table = kernels.asarray(rotary_table(80, 64))
            results = [ops.rope_ragged(kernels.asarray(q), *arguments, table, 1)]
        elif op == "rope_store":
            table, kv = kernels.asarray(rotary_table(80, 64)), kernels.asarray(q[:, :2])
            results = [ops.rope_store_kv(kernels.asarray(q), kv, kv, *arguments, table, 1)]
        elif op == "attention":
            results = list(ops.attention_ragged(kernels.asarray(q), *arguments, 1, return_lse=True))
        elif op == "add":
            kv = kernels.asarray(q[:, :2])
            ops.add_kv(kv, kv, *arguments, 1)
            results = []
        else:
            groups = (np.zeros(1, np.int32), None, np.array([0, len(q)], np.int32))
            x = kernels.asarray(q.reshape(len(q), -1))
            results = [ops.sgmv_qkv_lora(x, *weights, *groups, *arguments, 1)]
        blocks = kernels.to_host(on_device.blocks)
        hosts = [kernels.to_host(result) for result in results]
        return [
            (
                *(host[offsets[row] : offsets[row + 1]] for host in hosts),
                sequence_keys(case, blocks, collection.lookup_table, row, b),
            )
            for row, b in enumerate(order)
        ]

    expected = run([0, 1, 2, 3], cache)
    for order in ([0], [1], [2], [3], [3, 1, 0, 2], [2, 3], [0, 1, 2, 3]):
        for b, result in zip(order, run(order, rearranged(case, cache, order, rng)), strict=True):
            for one, other in zip(result, expected[b], strict=True):
                assert_bitwise_equal(one, other, f"sequence {b} in {order}")


# ---- The same call again -----------------------------------------------------------------------------


@contextlib.contextmanager
def another_run(kernels: KernelDevice, run: int) -> Iterator[None]:
    """On the emulator threads and blocks run in another order each time; a GPU does so by itself."""
    if kernels.name != "emulator":
        yield
        return
    schedule = ("in_order", "lifo", "random", "random")[run]
    with kernels.backend.scheduled(schedule, seed=run):
        yield


def calls(
    kernels: KernelDevice, dtype: Any, rng: np.random.Generator
) -> dict[str, Callable[[], list[Any]]]:
    """A call of each op on fresh copies of fixed inputs; all that it returned or wrote."""
    case = replace(CASE, dtype=dtype)
    cache = case.cache(rng)
    rows = case.rows(rng, 4)
    made = adapters(3, 17, 256, 128, dtype, rng)
    lora_b = kernels.asarray(made.lora_b.transpose(0, 2, 1)).transpose(0, 2, 1)
    lora_a, ids = kernels.asarray(made.lora_a), np.array([2, 0, -1, 1], np.int32)
    groups = (ids, None, row_offsets([3, 8, 1, 4]))
    q, kv = kernels.asarray(rows), kernels.asarray(rows[:, :2])
    x, offsets = kernels.asarray(rows.reshape(16, 256)), kernels.asarray(case.offsets())
    y, table = rng.standard_normal((16, 128)).astype(dtype), kernels.asarray(rotary_table(80, 64))

    def lora() -> list[Any]:
        return [ops.sgmv_lora(x, lora_a, lora_b, *groups, add_to=kernels.asarray(y.copy()))]

    def cached(op: Callable[..., Any], *before: Any, after: Any = ()) -> Callable[[], list[Any]]:
        def call() -> list[Any]:
            on_device = kernels.cache(cache)
            result = op(*before, offsets, on_device, *after)
            parts = result if isinstance(result, tuple) else (result,)
            return [on_device.blocks, *(part for part in parts if part is not None)]

        return call

    def attention(*arguments: Any) -> Any:
        return ops.attention_ragged(*arguments, return_lse=True)

    return {
        "lora": lora,
        "qkv": cached(ops.sgmv_qkv_lora, x, [lora_a] * 3, [lora_b] * 3, *groups, after=(1,)),
        "rope": cached(ops.rope_ragged, q, after=(table, 1)),
        "rope_store": cached(ops.rope_store_kv, q, kv, kv, after=(table, 1)),
        "store": cached(ops.store_kv, kv, kv, after=(1,)),
        "add": cached(ops.add_kv, kv, kv, after=(1,)),
        "attention": cached(attention, q, after=(1,)),
    }


@each_dtype
@pytest.mark.parametrize("op", ["lora", "qkv", "rope", "rope_store", "store", "add", "attention"])
def test_repeated_runs(
    op: str, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    call = calls(kernels, dtype, rng)[op]
    first = [kernels.to_host(result) for result in call()]
    for run in range(1, 4):
        with another_run(kernels, run):
            results = call()
        for one, other in zip(results, first, strict=True):
            assert_bitwise_equal(one, other, f"{op}, run {run}")


@each_dtype
@pytest.mark.parametrize("op", ["lora", "qkv", "rope", "rope_store", "store", "add", "attention"])
def test_another_stream(
    op: str, dtype: Any, gpu: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Ops run on the current stream: behind what is queued there, as the default stream's results show."""
    call = calls(kernels, dtype, rng)[op]
    expected = [kernels.to_host(result) for result in call()]
    gpu.cuda.Device().synchronize()
    stream = gpu.cuda.Stream(non_blocking=True)
    with stream:
        results = [kernels.to_host(result) for result in call()]
        stream.synchronize()
    for one, other in zip(results, expected, strict=True):
        assert_bitwise_equal(one, other)
