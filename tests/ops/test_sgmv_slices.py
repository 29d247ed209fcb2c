"""sgmv_lora_slices and sgmv_route: several outputs of one input, and a route for several calls."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit import ops, tiles
from lorakit.dtypes import bfloat16
from lorakit.testing import activations, adapters, assert_bitwise_equal, row_offsets
from tests.ops.helpers import each_dtype, launches

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

SLOTS, IN_DIM = 4, 72
WIDTHS, RANKS = (136, 24, 40, 9), (8, 33, 1, 16)  # of as many slices as need two launches
GROUPS = ((2, 3), (-1, 2), (0, 9), (3, 1), (2, 4))
ROWS = sum(rows for _, rows in GROUPS)


class Slices:
    """Four outputs of one x: their weights on the device, and the metadata of a batch."""

    def __init__(self, kernels: KernelDevice, dtype: Any, rng: np.random.Generator) -> None:
        self.kernels, self.dtype = kernels, dtype
        made = [
            adapters(SLOTS, rank, IN_DIM, width, dtype, rng, poison=True)
            for rank, width in zip(RANKS, WIDTHS, strict=True)
        ]
        place = kernels.asarray
        self.x = place(activations((ROWS, IN_DIM), dtype, rng))
        self.lora_a = [place(of.lora_a) for of in made]
        self.lora_b = [place(of.lora_b.transpose(0, 2, 1)).transpose(0, 2, 1) for of in made]
        self.slot_ranks = [place(of.slot_ranks) for of in made]
        self.bias = [place(made[0].bias), None, place(made[2].bias), None]
        ids = np.array([slot for slot, _ in GROUPS], np.int32)
        ranks = np.array([40, 0, 7, 40, 2], np.uint32)
        offsets = row_offsets([rows for _, rows in GROUPS])
        self.groups: tuple[Any, ...] = (place(ids), place(ranks), place(offsets))
        self.y = [activations((ROWS, width), dtype, rng) for width in WIDTHS]

    def targets(self, count: int) -> list[Any]:
        return [self.kernels.asarray(y) for y in self.y[:count]]

    def together(self, count: int, **options: Any) -> tuple[Any, ...]:
        return ops.sgmv_lora_slices(
            self.x,
            self.lora_a[:count],
            self.lora_b[:count],
            *self.groups,
            slot_ranks=self.slot_ranks[:count],
            bias=self.bias[:count],
            **options,
        )

    def apart(self, count: int, add_to: list[Any] | None = None) -> list[NDArray[Any]]:
        """Each slice by itself, which other tests show to be right."""
        return [
            self.kernels.to_host(
                ops.sgmv_lora(
                    self.x,
                    self.lora_a[i],
                    self.lora_b[i],
                    *self.groups,
                    slot_ranks=self.slot_ranks[i],
                    bias=self.bias[i],
                    add_to=None if add_to is None else add_to[i],
                )
            )
            for i in range(count)
        ]


@each_dtype
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_slices_have_the_bits_of_each_by_itself(
    count: int, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    given = Slices(kernels, dtype, rng)
    expected = given.apart(count)
    assert all(np.abs(np.float64(y)).max() > 0.1 for y in expected)
    for y, alone in zip(given.together(count), expected, strict=True):
        assert_bitwise_equal(y, alone)

    expected, targets = given.apart(count, given.targets(count)), given.targets(count)
    for y, target, alone in zip(
        given.together(count, add_to=targets), targets, expected, strict=True
    ):
        assert y is target
        assert_bitwise_equal(y, alone)


def test_slices_of_one_array(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """Columns of q, k and v side by side, as a layer has them."""
    given = Slices(kernels, bfloat16, rng)
    whole = kernels.asarray(np.concatenate(given.y[:3], axis=1))
    ends = np.cumsum((0, *WIDTHS[:3]))
    given.together(3, add_to=[whole[:, a:b] for a, b in itertools.pairwise(ends)])
    expected = np.concatenate(given.apart(3, given.targets(3)), axis=1)
    assert_bitwise_equal(whole, expected)


def test_slices_that_overlap(kernels: KernelDevice, rng: np.random.Generator) -> None:
    given = Slices(kernels, bfloat16, rng)
    whole = kernels.asarray(np.concatenate(given.y[:2], axis=1))
    before = kernels.to_host(whole).copy()
    targets = [whole[:, : WIDTHS[0]], whole[:, WIDTHS[0] - 1 : -1]]
    with pytest.raises(ValueError, match="add_to must be arrays that do not overlap"):
        given.together(2, add_to=targets)
    other = kernels.asarray(np.float32(given.y[1]))
    with pytest.raises(TypeError, match="add_to must be bfloat16, got float32"):
        given.together(2, add_to=[targets[0], other])
    assert_bitwise_equal(whole, before)


def test_results_over_inputs(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """x is read by each launch, and h by each block."""
    given = Slices(kernels, np.dtype(np.float32), rng)
    wide = kernels.asarray(rng.standard_normal((ROWS, IN_DIM + WIDTHS[1])).astype(np.float32))
    given.x = wide[:, :IN_DIM].copy()
    over_x = given.x[:, : WIDTHS[1]]
    others = [given.lora_a[1], given.lora_b[1]]
    with pytest.raises(ValueError, match="x and add_to must be arrays that do not overlap"):
        ops.sgmv_lora_slices(
            given.x,
            [others[0], others[0]],
            [others[1], others[1]],
            *given.groups,
            add_to=[over_x, given.targets(2)[1]],
        )
    h = kernels.asarray(np.ones((ROWS, 9), np.float32))
    b = kernels.asarray(np.ones((SLOTS, 9, 9), np.float32))
    with pytest.raises(ValueError, match="h and add_to must be arrays that do not overlap"):
        ops.sgmv_expand(h, b, *given.groups, add_to=h)


@each_dtype
def test_a_rank_of_nothing(dtype: Any, kernels: KernelDevice, rng: np.random.Generator) -> None:
    """Adapters stored at rank 0 add their bias alone, by themselves and beside others."""
    given = Slices(kernels, dtype, rng)
    none = kernels.asarray(np.zeros((SLOTS, 0, IN_DIM), dtype))
    b = kernels.asarray(np.zeros((SLOTS, WIDTHS[0], 0), dtype))
    assert ops.sgmv_shrink(given.x, none, *given.groups).shape == (ROWS, 0)
    bias = kernels.to_host(given.bias[0])
    slots = np.repeat([slot for slot, _ in GROUPS], [rows for _, rows in GROUPS])
    expected = np.where(slots[:, np.newaxis] < 0, 0, bias[slots]).astype(dtype)
    alone = ops.sgmv_lora(given.x, none, b, *given.groups, bias=given.bias[0])
    assert_bitwise_equal(alone, expected)
    both = ops.sgmv_lora_slices(
        given.x,
        [none, given.lora_a[1]],
        [b, given.lora_b[1]],
        *given.groups,
        slot_ranks=[None, given.slot_ranks[1]],
        bias=[given.bias[0], None],
    )
    assert_bitwise_equal(both[0], expected)
    assert_bitwise_equal(both[1], given.apart(2)[1])


def test_fewer_slots_of_one_slice(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """A slot that not all slices have is a bad one, on the device too."""
    given = Slices(kernels, bfloat16, rng)
    given.lora_a[1], given.lora_b[1] = given.lora_a[1][:3], given.lora_b[1][:3]
    given.slot_ranks[1] = given.slot_ranks[1][:3]
    together = given.together(2)
    assert "slot" in kernels.take_errors()
    ids = kernels.to_host(given.groups[0])
    given.groups = (kernels.asarray(np.where(ids == 3, -1, ids)), *given.groups[1:])
    for y, alone in zip(together, given.apart(2), strict=True):
        assert_bitwise_equal(y, alone)


@each_dtype
def test_one_route_for_all_calls(
    dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    given = Slices(kernels, dtype, rng)
    with launches(kernels) as seen:
        route = ops.sgmv_route(given.x, *given.groups, max_num_loras=SLOTS)
    assert seen == {tiles.sgmv_route_items()}
    expected = given.apart(3)
    with launches(kernels) as seen:
        for _ in range(2):  # counters are as before
            for y, alone in zip(given.together(3, route=route), expected, strict=True):
                assert_bitwise_equal(y, alone)
        h = ops.sgmv_shrink(given.x, given.lora_a[3], *given.groups, route=route)
        ops.sgmv_expand(h, given.lora_b[3], *given.groups, route=route)
    assert tiles.sgmv_route_items() not in seen


def test_a_route_of_host_metadata(kernels: KernelDevice, rng: np.random.Generator) -> None:
    given = Slices(kernels, bfloat16, rng)
    expected = given.apart(2)
    given.groups = tuple(kernels.to_host(array) for array in given.groups)
    route = ops.sgmv_route(given.x, *given.groups, max_num_loras=SLOTS)
    for y, alone in zip(given.together(2, route=route), expected, strict=True):
        assert_bitwise_equal(y, alone)
    given.groups[0][0] = 1
    with pytest.raises(ValueError, match="lora_ids must be as it was when route was made, got oth"):
        given.together(2, route=route)


def test_items_do_not_shrink_with_many_groups_of_known_rank(kernels: KernelDevice) -> None:
    """Each group might have a rank of its own, but a tile is chosen for adapters."""
    x = kernels.asarray(np.zeros((8192, 8), np.float32))
    ids = np.arange(256, dtype=np.int32) % 8
    offsets = row_offsets([32] * 256)
    for ranks in (None, np.full(256, 4, np.uint32)):
        route = ops.sgmv_route(x, ids, ranks, offsets, max_num_loras=8)
        assert route.item_rows == 128


@pytest.mark.parametrize(
    ("sizes", "slots"),
    [
        ([1, 1, 1, 61], 4),  # 3 items of one row, 8 of up to 8
        ([1] * 64, 64),
        ([0, 64, 0], 3),
        ([20, 30, 13], 3),
        ([1, 129, 17, 1], 9),
        ([1, 1, 4094], 3),
        ([5] * 40, 7),  # several groups of each slot
    ],
)
@pytest.mark.parametrize("with_ranks", [False, True])
def test_rows_have_room_for_their_items(
    sizes: list[int], slots: int, with_ranks: bool, kernels: KernelDevice
) -> None:
    """Every row is in one item of its slot, and the worst sizes take all the room that there is."""
    rows, groups = sum(sizes), len(sizes)
    ids = np.arange(groups, dtype=np.int32) % slots
    ranks = np.arange(groups, dtype=np.uint32) if with_ranks else None
    x = kernels.asarray(np.zeros((rows, 8), np.float32))
    route = ops.sgmv_route(x, ids, ranks, row_offsets(sizes), max_num_loras=slots)
    items = kernels.to_host(route.items)
    places = kernels.to_host(route.rows)
    count, slot_of = items[0, 0], np.repeat(ids, sizes)
    assert count <= len(places) == len(items) - 1
    used = [places[i, : items[1 + i, 1]] for i in range(count)]
    assert sorted(np.concatenate(used).tolist()) == list(range(rows))
    assert all((slot_of[own] == items[1 + i, 0]).all() for i, own in enumerate(used))
    if sizes.count(1) >= groups - 1:
        assert count == len(places)


@pytest.mark.parametrize("rows", [3, 200, 2048, 4096])
def test_a_slice_without_ranks_has_any_strides(
    rows: int, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """Its A and B start off 16-byte boundaries, as nothing is read of them."""
    made = adapters(2, 80, 64, 24, bfloat16, rng)
    x = kernels.asarray(activations((rows, 64), bfloat16, rng))
    a, b = kernels.asarray(made.lora_a), kernels.asarray(made.lora_b.transpose(0, 2, 1))
    odd = kernels.asarray(np.zeros((2, 4 * 64 + 1), bfloat16))
    empty_a = odd[:, :64].reshape(2, 1, 64)[:, :0]
    empty_b = odd[:, :24].reshape(2, 1, 24)[:, :0]
    assert empty_a.strides[0] % 16
    batch = np.array([1], np.int32), None, np.array([0, rows], np.int32)
    y, nothing = ops.sgmv_lora_slices(
        x, [a, empty_a], [b.transpose(0, 2, 1), empty_b.transpose(0, 2, 1)], *batch
    )
    assert_bitwise_equal(y, ops.sgmv_lora(x, a, b.transpose(0, 2, 1), *batch))
    assert np.float64(kernels.to_host(y)).any()
    assert not np.float64(kernels.to_host(nothing)).any()


def test_an_empty_route(kernels: KernelDevice, rng: np.random.Generator) -> None:
    given = Slices(kernels, bfloat16, rng)
    ids, _, offsets = given.groups
    given.groups = (ids[:0], None, offsets[:1])
    route = ops.sgmv_route(given.x, *given.groups, max_num_loras=SLOTS)
    with launches(kernels) as seen:
        (y,) = given.together(1, route=route)
    assert not seen
    assert not np.float64(kernels.to_host(y)).any()


def test_a_route_of_something_else(kernels: KernelDevice, rng: np.random.Generator) -> None:
    given = Slices(kernels, bfloat16, rng)
    route = ops.sgmv_route(given.x, *given.groups, max_num_loras=SLOTS)
    elsewhere = "CPU" if route.place != "the CPU" else "GPU 0"
    for other, error, message in (
        (ops.sgmv_route(given.x, *given.groups, max_num_loras=9), ValueError, "= 4, got 9"),
        (replace(route, total_tokens=5), ValueError, "total_tokens = 19, got 5"),
        (replace(route, lora_ids=given.groups[0].copy()), ValueError, "from this lora_ids"),
        (replace(route, lora_ranks=None), ValueError, "from this lora_ranks"),
        (replace(route, place=elsewhere), TypeError, f"route must be on .*, got {elsewhere}"),
        (route.items, TypeError, "route must be made by sgmv_route, got"),
    ):
        with pytest.raises(error, match=message):
            given.together(1, route=other)
    shorter = given.groups[2][:-1]
    with pytest.raises(ValueError, match="from this lora_grouped_offsets"):
        ops.sgmv_lora(
            given.x,
            given.lora_a[0],
            given.lora_b[0],
            given.groups[0][:-1],
            None,
            shorter,
            route=replace(route, lora_ids=given.groups[0][:-1], lora_ranks=None),
        )
