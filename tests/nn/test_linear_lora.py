"""Adapters beside a dense layer, against merged weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorakit import DeviceRef, DType, Linear, LinearLoRA, SupportsLoRA, ops
from tests.nn.helpers import STORAGE, assert_within_budget, normal, offsets, rounding, wide

IN, OUT, SLOTS, RANK = 24, 16, 4, 6


def lora(
    device: DeviceRef, dtype: DType = DType.float32, *, load: bool = True, **arguments: Any
) -> LinearLoRA:
    """A layer with a random base, a full adapter in slot 0 and one of rank 2 in slot 2."""
    layer = LinearLoRA(IN, OUT, SLOTS, RANK, dtype, device, **arguments)
    state = {"weight": normal(1, OUT, IN, dtype=dtype, scale=IN**-0.5)}
    if layer.bias is not None:
        state["bias"] = normal(2, OUT, dtype=dtype)
    layer.load_state_dict(state)
    if load:
        for slot, rank in ((0, RANK), (2, 2)):
            bias = normal(9 + slot, OUT, dtype=dtype) if layer.lora_bias is not None else None
            a, b = normal(3 + slot, rank, IN, dtype=dtype), normal(4 + slot, OUT, rank, dtype=dtype)
            layer.set_adapter(slot, a, b, scaling=0.25, lora_bias=bias)
    return layer


def info(*groups: tuple[int, int], rank: int = RANK) -> tuple[Any, Any, Any]:
    """Batch info of (slot, rows) groups."""
    return (
        np.array([slot for slot, _ in groups], np.int32),
        np.full(len(groups), rank, np.uint32),
        offsets(*(rows for _, rows in groups)),
    )


BATCHES = [
    pytest.param(((0, 16),), id="one adapter"),
    pytest.param(((0, 8), (0, 12), (0, 10)), id="one adapter in three groups"),
    pytest.param(((2, 5), (-1, 3), (0, 1), (-9, 2), (2, 1)), id="mixed with base"),
    pytest.param(((0, 0), (2, 3), (0, 0)), id="empty groups"),
    pytest.param(((1, 3), (3, 2)), id="slots that hold nothing"),
    pytest.param((), id="no groups"),
]


def expected(
    layer: LinearLoRA, to_host: Any, x: Any, groups: Any, dtype: DType | None, rank: int = RANK
) -> Any:
    """Row by row with merged weights ``W + B A``, or rounded where the layer stores."""
    store = rounding(dtype)
    weight, a, b = (wide(to_host(w)) for w in (layer.weight, layer.lora_A, layer.lora_B))
    y = wide(x) @ weight.T
    if layer.bias is not None:
        y += wide(to_host(layer.bias))
    y = store(y)
    row = 0
    for slot, rows in groups:
        if slot >= 0:
            merged = b[slot, :, :rank] @ a[slot, :rank]
            y[row : row + rows] += wide(x[row : row + rows]) @ merged.T
            if layer.lora_bias is not None:
                y[row : row + rows] += wide(to_host(layer.lora_bias))[slot]
        row += rows
    return store(y)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("groups", BATCHES)
@pytest.mark.parametrize("biases", [{}, {"has_bias": True, "has_lora_bias": True}])
def test_merged_weights(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType, groups: Any, biases: Any
) -> None:
    layer = lora(device, dtype, **biases)
    rows = sum(count for _, count in groups) + 2  # two rows past the last offset
    x = normal(8, rows, IN, dtype=dtype)
    layer.set_lora_batch_info(*info(*groups))
    exact = expected(layer, to_host, x, groups, None)
    rounded = expected(layer, to_host, x, groups, dtype)
    y = to_host(layer.apply_lora(to_device(x)))
    assert y.dtype == dtype.to_numpy()
    assert_within_budget(y, exact, rounded)
    np.testing.assert_array_equal(to_host(layer(to_device(x))), y)


def test_adapters_change_the_result_by_more_than_any_budget(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    layer, x = lora(device), normal(8, 5, IN)
    base = to_host(layer(to_device(x)))
    layer.set_lora_batch_info(*info((0, 5)))
    assert np.abs(to_host(layer(to_device(x))) - base).min(axis=1).max() > 0.01


@pytest.mark.parametrize("dtype", STORAGE)
def test_base_rows_are_those_of_the_plain_layer_bit_for_bit(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType
) -> None:
    layer = lora(device, dtype, has_bias=True, has_lora_bias=True)
    plain = Linear(IN, OUT, dtype, device, has_bias=True)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = normal(8, 12, IN, dtype=dtype)
    layer.set_lora_batch_info(*info((0, 3), (-1, 4), (2, 3)))
    y, base = to_host(layer(to_device(x))), to_host(plain(to_device(x)))
    for rows in (slice(3, 7), slice(10, 12)):
        assert y[rows].tobytes() == base[rows].tobytes()
    assert (y[:3] != base[:3]).any()
    layer.set_lora_batch_info(None, None, None)
    assert to_host(layer(to_device(x))).tobytes() == base.tobytes()


def test_call_without_info_is_the_base_and_apply_lora_raises(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    layer, x = lora(device), normal(8, 5, IN)
    np.testing.assert_allclose(
        to_host(layer(to_device(x))), x @ to_host(layer.weight).T, rtol=1e-5, atol=1e-6
    )
    assert layer.lora_ids is layer.lora_ranks is layer.lora_grouped_offsets is None
    with pytest.raises(ValueError, match="set_lora_batch_info must be called before apply_lora"):
        layer.apply_lora(to_device(x))


def test_leading_axes_are_flattened_to_rows(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    layer, x = lora(device), normal(8, 6, IN)
    layer.set_lora_batch_info(*info((0, 2), (-1, 1), (2, 3)))
    flat = to_host(layer(to_device(x)))
    y = to_host(layer(to_device(x.reshape(2, 3, IN))))
    assert y.shape == (2, 3, OUT)
    np.testing.assert_array_equal(y.reshape(6, OUT), flat)


def test_rows_may_start_anywhere_in_memory(device: DeviceRef, to_device: Any, to_host: Any) -> None:
    """A slice of rows of 6 float32 begins at no multiple of 16 bytes."""
    layer = LinearLoRA(6, 4, 1, 2, DType.float32, device)
    layer.load_state_dict({"weight": normal(1, 4, 6)})
    layer.set_adapter(0, normal(2, 2, 6), normal(3, 4, 2))
    layer.set_lora_batch_info(*info((0, 3), (-1, 1)))
    x = normal(4, 5, 6)
    y = to_host(layer(to_device(x)[1:]))
    np.testing.assert_allclose(y, to_host(layer(to_device(x[1:].copy()))), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bound", [1, 2, 4, None])
def test_lora_ranks_bound_the_rank_of_a_group(
    device: DeviceRef, to_device: Any, to_host: Any, bound: int | None
) -> None:
    layer, x = lora(device), normal(8, 5, IN)
    ids, ranks, groups = info((0, 5), rank=bound or 0)
    layer.set_lora_batch_info(ids, None if bound is None else ranks, groups)
    exact = expected(layer, to_host, x, ((0, 5),), None, bound or RANK)
    assert_within_budget(to_host(layer(to_device(x))), exact, exact)


# ---- Slots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE)
def test_set_adapter_folds_the_scaling_pads_and_sets_the_rank(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType
) -> None:
    layer = lora(device, dtype, has_lora_bias=True)
    a, b, bias = normal(5, 3, IN), normal(6, OUT, 3), normal(7, OUT)
    layer.set_adapter(0, to_device(a), b, scaling=1.7, lora_bias=bias)  # from any device
    store = dtype.to_numpy()
    np.testing.assert_array_equal(to_host(layer.lora_A)[0, :3], a.astype(store))
    np.testing.assert_array_equal(
        to_host(layer.lora_B)[0, :, :3], (np.float32(1.7) * b).astype(store)
    )
    np.testing.assert_array_equal(to_host(layer.lora_bias)[0], bias.astype(store))
    assert not to_host(layer.lora_A)[0, 3:].any()  # the larger adapter before is gone
    assert not to_host(layer.lora_B)[0, :, 3:].any()
    assert to_host(layer.slot_ranks).tolist() == [3, RANK, 2, RANK]
    layer.set_adapter(0, a, b)
    assert not to_host(layer.lora_bias)[0].any()


def test_an_adapter_may_come_from_a_slot(device: DeviceRef, to_host: Any) -> None:
    layer = lora(device)
    a, b = to_host(layer.lora_A)[2].copy(), to_host(layer.lora_B)[2].copy()
    for slot in (2, 1):
        layer.set_adapter(slot, layer.lora_A[2, :2], layer.lora_B[2, :, :2])
        np.testing.assert_array_equal(to_host(layer.lora_A)[slot], a)
        np.testing.assert_array_equal(to_host(layer.lora_B)[slot], b)
    assert a.any()


def test_other_slots_stay_as_they_are(device: DeviceRef, to_host: Any) -> None:
    layer = lora(device)
    before = {name: to_host(array).copy() for name, array in layer.state_dict().items()}
    layer.set_adapter(1, normal(5, 3, IN), normal(6, OUT, 3))
    for name in ("lora_A.weight", "lora_B.weight"):
        after = to_host(layer.state_dict()[name])
        np.testing.assert_array_equal(after[[0, 2, 3]], before[name][[0, 2, 3]])
        assert after[1].any()


def test_clear_adapter_and_set_slot_rank(device: DeviceRef, to_device: Any, to_host: Any) -> None:
    layer, x = lora(device, has_lora_bias=True), normal(8, 5, IN)
    base = to_host(layer(to_device(x)))
    layer.set_lora_batch_info(*info((2, 5)))
    layer.set_slot_rank(2, 1)
    assert to_host(layer.slot_ranks).tolist() == [RANK, RANK, 1, RANK]
    exact = expected(layer, to_host, x, ((2, 5),), None, rank=1)
    assert_within_budget(to_host(layer(to_device(x))), exact, exact)
    layer.clear_adapter(2)
    assert to_host(layer.slot_ranks).tolist() == [RANK] * SLOTS
    np.testing.assert_array_equal(to_host(layer(to_device(x))), base)


def test_writing_a_view_takes_effect_at_the_next_call(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    layer, x = lora(device, load=False), normal(8, 5, IN)
    layer.set_lora_batch_info(*info((3, 5)))
    to_host(layer(to_device(x)))
    layer.lora_A[3] = to_device(normal(5, RANK, IN))
    layer.lora_B[3] = to_device(normal(6, OUT, RANK))
    exact = expected(layer, to_host, x, ((3, 5),), None)
    assert_within_budget(to_host(layer(to_device(x))), exact, exact)


def test_loading_adapter_weights_counts_them_at_full_rank(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    layer, x = lora(device), normal(8, 5, IN)
    assert to_host(layer.slot_ranks)[2] == 2
    layer.load_state_dict(
        {"lora_A.weight": normal(5, SLOTS, RANK, IN), "lora_B.weight": normal(6, SLOTS, OUT, RANK)},
        strict=False,
    )
    assert to_host(layer.slot_ranks).tolist() == [RANK] * SLOTS
    layer.set_lora_batch_info(*info((2, 5)))
    exact = expected(layer, to_host, x, ((2, 5),), None)
    assert_within_budget(to_host(layer(to_device(x))), exact, exact)


def test_storage_of_b_is_rank_major(device: DeviceRef) -> None:
    layer = lora(device)
    assert layer.lora_A.shape == (SLOTS, RANK, IN)
    assert layer.lora_B.shape == (SLOTS, OUT, RANK)
    assert layer.lora_B.transpose(0, 2, 1).flags.c_contiguous


def test_names_and_prefix(device: DeviceRef) -> None:
    names = ["weight", "bias", "lora_A.weight", "lora_B.weight", "lora.bias"]
    assert list(lora(device, has_bias=True, has_lora_bias=True).state_dict()) == names
    named = LinearLoRA(IN, OUT, 1, 1, DType.float32, device, name="n", has_lora_bias=True)
    assert list(named.state_dict()) == [
        "weight",
        "n.lora_A.weight",
        "n.lora_B.weight",
        "n.lora.bias",
    ]
    assert lora(device).lora_bias is None


def test_supports_lora_is_structural(device: DeviceRef) -> None:
    assert isinstance(lora(device), SupportsLoRA)
    assert not isinstance(Linear(IN, OUT, DType.float32, device), SupportsLoRA)

    class Other:
        def set_lora_batch_info(self, *arguments: Any) -> None: ...
        def apply_lora(self, x: Any) -> Any: ...

    assert isinstance(Other(), SupportsLoRA)
    with pytest.raises(TypeError):
        SupportsLoRA()  # type: ignore[misc]


# ---- Metadata ------------------------------------------------------------------------------------


def test_host_info_is_a_snapshot_and_device_info_a_reference(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    layer = lora(device)
    ids, ranks, groups = info((0, 5))
    layer.set_lora_batch_info(ids, ranks, groups)
    ids[0] = 3
    assert to_host(layer.lora_ids).tolist() == [0]
    if device.is_gpu():
        arrays = tuple(to_device(array) for array in (ids, ranks, groups))
        layer.set_lora_batch_info(*arrays)
        assert layer.lora_ids is arrays[0]
        assert layer.lora_ranks is arrays[1]
        assert layer.lora_grouped_offsets is arrays[2]


GOOD = info((0, 2), (-1, 3))


@pytest.mark.parametrize(
    ("position", "value", "error", "words"),
    [
        (0, np.array([4, 0], "i4"), ValueError, "lora_ids must be below max_num_loras = 4, got 4"),
        (0, np.array([0, 0], "i8"), TypeError, "lora_ids must be int32, got int64"),
        (
            0,
            np.array([0], "i4"),
            ValueError,
            "lora_ranks has groups = 2, but lora_ids has 1|lora_gr",
        ),
        (0, [0, -1], TypeError, "lora_ids must be an array"),
        (0, None, TypeError, "lora_ids must be an array"),
        (1, np.array([1, -1], "i4"), ValueError, "lora_ranks must not be negative, got -1"),
        (1, np.array([1, 1], "f4"), TypeError, "lora_ranks must be uint32 or int32, got float32"),
        (1, np.array([1], "u4"), ValueError, "lora_ranks has groups = 1"),
        (2, np.array([0, 3, 2], "u4"), ValueError, "lora_grouped_offsets must not decrease"),
        (2, np.array([1, 3, 5], "u4"), ValueError, "lora_grouped_offsets must start at 0, got 1"),
        (2, np.array([0, 5], "u4"), ValueError, "lora_grouped_offsets has groups = 1"),
        (2, np.array([0, 2, 5], "u8"), TypeError, "lora_grouped_offsets must be uint32 or int32"),
        (2, np.array(0, "u4"), ValueError, "lora_grouped_offsets must have shape"),
    ],
)
def test_bad_info_leaves_the_old(
    device: DeviceRef, position: int, value: Any, error: type[Exception], words: str
) -> None:
    layer = lora(device)
    layer.set_lora_batch_info(*info((2, 1)))
    before = layer.batch_info
    arguments = list(GOOD)
    arguments[position] = value
    with pytest.raises(error, match=words):
        layer.set_lora_batch_info(*arguments)
    assert layer.batch_info is before


@pytest.mark.parametrize("kind", [np.uint32, np.int32])
def test_both_integer_types_are_taken(
    device: DeviceRef, to_device: Any, to_host: Any, kind: type[Any]
) -> None:
    layer, x = lora(device), normal(8, 5, IN)
    ids, ranks, groups = info((0, 2), (2, 3))
    layer.set_lora_batch_info(ids, ranks.astype(kind), groups.astype(kind))
    exact = expected(layer, to_host, x, ((0, 2), (2, 3)), None)
    assert_within_budget(to_host(layer(to_device(x))), exact, exact)


def test_a_route_shared_by_layers(device: DeviceRef, to_device: Any, to_host: Any) -> None:
    layers, x = (lora(device), lora(device)), to_device(normal(8, 5, IN))
    for host in (False, True):
        batch = info((0, 2), (-1, 1), (2, 2))
        batch = batch if host else tuple(to_device(array) for array in batch)
        route = ops.sgmv_route(x, *batch, max_num_loras=4)
        for layer in layers:
            layer.set_lora_batch_info(*batch)
            alone = to_host(layer(x))
            layer.set_lora_batch_info(*batch, route=route)
            assert to_host(layer(x)).tobytes() == alone.tobytes()
            assert layer.batch_info is not None
            assert layer.batch_info.route is route


def test_a_route_of_other_arrays(device: DeviceRef, to_device: Any) -> None:
    layer, x = lora(device), to_device(normal(8, 5, IN))
    batch: Any = tuple(to_device(array) for array in info((0, 5)))
    layer.set_lora_batch_info(*batch)
    before = layer.batch_info
    route = ops.sgmv_route(x, *batch, max_num_loras=4)
    for position, name in enumerate(("lora_ids", "lora_ranks", "lora_grouped_offsets")):
        others = list(batch)
        others[position] = batch[position].copy()
        with pytest.raises(ValueError, match=f"route must be made from this {name}"):
            layer.set_lora_batch_info(*others, route=route)
    with pytest.raises(TypeError, match="route must be made by sgmv_route, got tuple"):
        layer.set_lora_batch_info(*batch, route=batch)
    assert layer.batch_info is before
    layer.set_lora_batch_info(*batch, route=route)
    with pytest.raises(ValueError, match="route must be made for total_tokens = 6, got 5"):
        layer(to_device(normal(8, 6, IN)))


def test_groups_may_not_end_past_the_rows(device: DeviceRef, to_device: Any) -> None:
    layer = lora(device)
    layer.set_lora_batch_info(*info((0, 6)))
    with pytest.raises(ValueError, match="lora_grouped_offsets must end at most 5"):
        layer(to_device(normal(8, 5, IN)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"slot": 4}, ValueError, r"slot must be in \[0, max_num_loras = 4\), got 4"),
        ({"slot": -1}, ValueError, "slot must be in"),
        ({"slot": 1.0}, TypeError, "slot must be an integer"),
        ({"lora_A": normal(1, 7, IN), "lora_B": normal(1, OUT, 7)}, ValueError, "at most max_lora"),
        ({"lora_A": normal(1, 2, IN)}, ValueError, "lora_B has rank = 3, but lora_A has 2"),
        ({"lora_A": normal(1, 3, IN + 1)}, ValueError, r"lora_A must have shape \[rank, 24\]"),
        ({"lora_B": normal(1, OUT + 1, 3)}, ValueError, r"lora_B must have shape \[16, rank\]"),
        ({"lora_A": np.zeros((3, IN), "f8")}, TypeError, "lora_A must be .*, got float64"),
        ({"scaling": float("inf")}, ValueError, "scaling must be finite, got inf"),
        ({"lora_bias": normal(1, OUT)}, ValueError, "lora_bias must be None"),
    ],
)
def test_bad_adapters_leave_the_slot(
    device: DeviceRef, to_host: Any, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    layer = lora(device)
    before = {name: to_host(array).copy() for name, array in layer.state_dict().items()}
    arguments: dict[str, Any] = {"slot": 0, "lora_A": normal(1, 3, IN), "lora_B": normal(1, OUT, 3)}
    with pytest.raises(error, match=words):
        layer.set_adapter(**(arguments | change))
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(to_host(array), before[name])
    assert to_host(layer.slot_ranks).tolist() == [RANK, RANK, 2, RANK]


def test_bad_biases_and_ranks(device: DeviceRef, to_host: Any) -> None:
    layer = lora(device, has_lora_bias=True)
    with pytest.raises(ValueError, match=r"lora_bias must have shape \[16\]"):
        layer.set_adapter(0, normal(1, 3, IN), normal(1, OUT, 3), lora_bias=normal(1, 3))
    for rank in (-1, RANK + 1):
        with pytest.raises(ValueError, match=r"rank must be in \[0, max_lora_rank = 6\]"):
            layer.set_slot_rank(0, rank)
    assert to_host(layer.slot_ranks)[0] == RANK


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_num_loras": 0}, ValueError, "max_num_loras must be at least 1"),
        ({"max_lora_rank": 0}, ValueError, "max_lora_rank must be at least 1"),
        ({"quantization_encoding": "Q4_0"}, NotImplementedError, "quantization_encoding"),
        ({"float8_config": object()}, NotImplementedError, "float8_config"),
    ],
)
def test_constructor_refusals(
    device: DeviceRef, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments: dict[str, Any] = {
        "in_dim": IN,
        "out_dim": OUT,
        "max_num_loras": 2,
        "max_lora_rank": 2,
        "dtype": DType.float32,
        "device": device,
    }
    with pytest.raises(error, match=words):
        LinearLoRA(**(arguments | change))
