"""The attention layer with adapters, against merged weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from lorakit import (
    AttentionWithRope,
    AttentionWithRopeAndLoRA,
    DeviceRef,
    DType,
    Linear,
    LinearLoRA,
    SupportsLoRA,
    build_lora_batch,
    ops,
)
from tests.nn.helpers import (
    STORAGE,
    Setup,
    assert_within_budget,
    claim,
    normal,
    offsets,
    setup,
    state_of,
    wide,
)
from tests.nn.test_attention import run

RANKS = {0: 16, 2: 3, 5: 8}


def with_adapters(device: DeviceRef, dtype: DType = DType.float32, **options: Any) -> Setup:
    """Adapters of ranks 16, 3 and 8 in slots 0, 2 and 5."""
    s = setup(device, dtype, **options)
    for slot, rank in RANKS.items():
        s.put(slot, s.adapter(100 * (slot + 1), rank), scaling=0.5)
    return s


def adapter_of(s: Setup, slot: int, to_host: Any) -> Any:
    """(A, B) of each projection as stored, B scaled; None for the base model."""
    if slot < 0:
        return None
    return {
        name: (
            wide(to_host(getattr(s.layer, f"{name}_proj").lora_A)[slot]),
            wide(to_host(getattr(s.layer, f"{name}_proj").lora_B)[slot]),
        )
        for name in "qkvo"
    }


def set_batch(s: Setup, slots: list[int], lengths: list[int]) -> None:
    s.layer.set_lora_batch_info(*build_lora_batch(slots, offsets(*lengths), RANKS))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"interleaved": False, "has_bias": True}, id="half pairs, biases"),
        pytest.param({"stacked_qkv": True, "has_bias": True}, id="stacked"),
        pytest.param({"scale": 0.0}, id="scale 0"),
    ],
)
def test_mixed_adapters_through_prefill_and_decode(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType, options: dict[str, Any]
) -> None:
    s = with_adapters(device, dtype, **options)
    requests, slots, lengths = ["a", "b", "c", "d"], [0, 2, -1, 0], [5, 7, 2, 1]
    claim(s.manager, requests)
    xs = [s.tokens(30 + i, n + 2) for i, n in enumerate(lengths)]
    set_batch(s, slots, lengths)
    got = [run(s, requests, [x[:n] for x, n in zip(xs, lengths, strict=True)], to_device, to_host)]
    set_batch(s, slots, [1] * 4)
    for step in range(2):
        rows = [x[n + step : n + step + 1] for x, n in zip(xs, lengths, strict=True)]
        got.append(run(s, requests, rows, to_device, to_host))
    for i, (x, slot) in enumerate(zip(xs, slots, strict=True)):
        adapter = adapter_of(s, slot, to_host)
        y = np.concatenate([step[i] for step in got])
        exact = s.model.rows(x, adapter)
        assert_within_budget(y, exact, s.model.rows(x, adapter, dtype=dtype))
        if slot >= 0:  # the adapter matters
            assert np.abs(s.model.rows(x) - exact).max() > 0.1


@pytest.mark.parametrize("projections", ["q", "k", "v", "o", "qkvo"])
def test_merged_weights(device: DeviceRef, to_device: Any, to_host: Any, projections: str) -> None:
    """Plain attention with ``W + scaling B A``, each projection alone and all together."""
    s = setup(device)
    adapter = {name: ab for name, ab in s.adapter(7, 5).items() if name in projections}
    s.put(3, adapter, scaling=0.5)
    merged = {
        name: (w + 0.5 * adapter[name][1] @ adapter[name][0] if name in adapter else w)
        for name, w in s.model.weights.items()
    }
    plain = setup(device, layer_cls=AttentionWithRope)
    plain.layer.load_state_dict(
        state_of({name: w.astype(np.float32) for name, w in merged.items()}, {}, False)
    )
    x = normal(30, 9, 40)
    claim(s.manager, ["a"])
    claim(plain.manager, ["a"])
    s.layer.set_lora_batch_info(*build_lora_batch([3], offsets(9), {3: 5}))
    (y,) = run(s, ["a"], [x], to_device, to_host)
    (expected,) = run(plain, ["a"], [x], to_device, to_host)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
    assert np.abs(expected - s.model.rows(x)).max() > 0.01


@pytest.mark.parametrize("dtype", STORAGE)
def test_base_rows_are_those_of_the_plain_layer_bit_for_bit(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType
) -> None:
    s = with_adapters(device, dtype, has_bias=True)
    plain = AttentionWithRope(
        rope=s.rope,
        num_attention_heads=6,
        num_key_value_heads=2,
        hidden_size=40,
        kv_params=s.layer.kv_params,
        devices=[device],
        dtype=dtype,
        has_bias=True,
    )
    state = s.layer.state_dict()
    plain.load_state_dict({name: w for name, w in state.items() if "lora" not in name})
    rows = [s.tokens(30, 4), s.tokens(31, 5), s.tokens(32, 3)]
    requests, twins = ["a", "b", "c"], ["d", "e", "f"]
    claim(s.manager, [*requests, *twins])
    set_batch(s, [0, -1, 2], [4, 5, 3])
    with_lora = run(s, requests, rows, to_device, to_host)
    base = run(s, twins, rows, to_device, to_host, layer=plain)
    assert with_lora[1].tobytes() == base[1].tobytes()
    assert (with_lora[0] != base[0]).any()
    assert (with_lora[2] != base[2]).any()
    blocks = to_host(s.manager.blocks)
    pages, twin_pages = (s.manager.get_req_blocks(name) for name in ("b", "e"))
    assert blocks[pages].tobytes() == blocks[twin_pages].tobytes()


@pytest.mark.parametrize("dtype", STORAGE)
def test_stacked_equals_unstacked(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType
) -> None:
    results = []
    for stacked_qkv in (False, True):
        s = with_adapters(device, dtype, has_bias=True, stacked_qkv=stacked_qkv)
        claim(s.manager, ["a", "b"])
        set_batch(s, [5, 2], [4, 3])
        rows = [s.tokens(30, 4), s.tokens(31, 3)]
        results.append(np.concatenate(run(s, ["a", "b"], rows, to_device, to_host)))
    assert results[0].tobytes() == results[1].tobytes()


def test_lora_biases_are_added_once_and_clipping_spares_adapters(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    make = partial(LinearLoRA, max_num_loras=2, max_lora_rank=4, has_lora_bias=True)
    s = setup(device, linear_cls=make, clip_qkv=0.1, has_bias=True)
    assert s.layer.k_proj.max_num_loras == 2
    adapter = s.adapter(
        7, 4
    )  # larger ones make a softmax so sharp that it magnifies float32's sums
    biases = {
        name: wide(normal(50 + i, len(s.model.weights[name]))) for i, name in enumerate("qkvo")
    }
    for name, (a, b) in adapter.items():
        getattr(s.layer, f"{name}_proj").set_adapter(
            1, a.astype("f4"), b.astype("f4"), lora_bias=biases[name].astype("f4")
        )
    for name in "qkv":
        s.model.weights[name] = np.clip(s.model.weights[name], -np.float32(0.1), np.float32(0.1))
    x = s.tokens(30, 6)
    claim(s.manager, ["a", "b"])
    s.layer.set_lora_batch_info(*build_lora_batch([1, -1], offsets(6, 6), {1: 4}))
    y, base = run(s, ["a", "b"], [x, x], to_device, to_host)
    exact = s.model.rows(x, adapter, biases)
    assert_within_budget(y, exact, s.model.rows(x, adapter, biases, dtype=s.dtype))
    assert_within_budget(base, s.model.rows(x), s.model.rows(x))


def test_without_info_it_is_the_base_layer(device: DeviceRef, to_device: Any, to_host: Any) -> None:
    s = with_adapters(device)
    x = s.tokens(30, 5)
    claim(s.manager, ["a", "b"])
    (y,) = run(s, ["a"], [x], to_device, to_host)
    assert_within_budget(y, s.model.rows(x), s.model.rows(x))
    set_batch(s, [0], [5])
    s.layer.set_lora_batch_info(None, None, None)
    (again,) = run(s, ["b"], [x], to_device, to_host)
    assert again.tobytes() == y.tobytes()


@pytest.mark.parametrize("name", "qkv")
def test_each_projection_has_ranks_of_its_own(
    device: DeviceRef, to_device: Any, to_host: Any, name: str
) -> None:
    s = with_adapters(device)
    x = s.tokens(30, 5)
    getattr(s.layer, f"{name}_proj").set_slot_rank(2, 1)
    claim(s.manager, ["a"])
    set_batch(s, [2], [5])
    (y,) = run(s, ["a"], [x], to_device, to_host)
    adapter = adapter_of(s, 2, to_host)
    whole = s.model.rows(x, adapter)
    a, b = adapter[name]
    adapter[name] = a[:1], b[:, :1]
    exact = s.model.rows(x, adapter)
    assert_within_budget(y, exact, exact)
    assert np.abs(whole - exact).max() > 0.01


def test_info_of_o_proj_alone(device: DeviceRef, to_device: Any, to_host: Any) -> None:
    s = with_adapters(device)
    x = s.tokens(30, 5)
    s.layer.o_proj.set_lora_batch_info(*build_lora_batch([2], offsets(5), RANKS))
    claim(s.manager, ["a"])
    (y,) = run(s, ["a"], [x], to_device, to_host)
    exact = s.model.rows(x, {"o": adapter_of(s, 2, to_host)["o"]})
    assert_within_budget(y, exact, exact)


def test_the_info_of_q_proj_counts_for_k_and_v(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    s = with_adapters(device)
    x = s.tokens(30, 5)
    s.layer.q_proj.set_lora_batch_info(*build_lora_batch([2], offsets(5), RANKS))
    s.layer.k_proj.set_lora_batch_info(*build_lora_batch([0], offsets(5), RANKS))
    claim(s.manager, ["a"])
    (y,) = run(s, ["a"], [x], to_device, to_host)
    adapter = adapter_of(s, 2, to_host)
    del adapter["o"]
    assert_within_budget(y, s.model.rows(x, adapter), s.model.rows(x, adapter))

    s.layer.q_proj.set_lora_batch_info(None, None, None)
    s.manager.release("a")
    claim(s.manager, ["a"])
    with pytest.raises(ValueError, match="set_lora_batch_info must be called on q_proj"):
        run(s, ["a"], [x], to_device, to_host)


# ---- fused_qkv_lora ------------------------------------------------------------------------------


def cached(s: Setup, request: str, to_host: Any, layer: int = 1) -> Any:
    """``[2, tokens, KV]``: what the pages of a request hold, in order."""
    blocks = to_host(s.manager.blocks)[s.manager.get_req_blocks(request), :, layer]
    return blocks.transpose(1, 0, 2, 3, 4).reshape(2, -1, s.layer.kv_weight_dim)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    "slots", [[0, 0, 0], [2, -1, 0], [-1, -1, -1], [5, 2, 5]], ids=lambda s: " ".join(map(str, s))
)
def test_fused_qkv_lora(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType, slots: list[int]
) -> None:
    """Returns q's delta alone; adds k's and v's where this step's keys and values are."""
    s = with_adapters(device, dtype)
    s.manager.blocks[...] = 1
    lengths, requests = [5, 2, 4], ["a", "b", "c"]
    claim(s.manager, requests)
    s.manager.fetch(requests, [2, 3, 1])  # a step before this one
    s.manager.step(requests)
    collection = s.manager.fetch(requests, lengths)
    x = s.tokens(30, 11)
    set_batch(s, slots, lengths)
    delta = s.layer.fused_qkv_lora(to_device(x), collection, offsets(*lengths), 1)
    assert delta.dtype == dtype.to_numpy()
    got, ends = to_host(delta), np.cumsum(lengths)
    assert got.shape == (11, 96)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype.to_numpy().name]
    for i, (request, slot, before) in enumerate(zip(requests, slots, [2, 3, 1], strict=True)):
        rows = slice(ends[i] - lengths[i], ends[i])
        both = wide(cached(s, request, to_host))
        assert (both[:, :before] == 1).all()
        assert (both[:, before + lengths[i] :] == 1).all()
        new = both[:, before : before + lengths[i]]
        if slot < 0:
            assert not got[rows].any()
            assert (new == 1).all()
            continue
        adapter = adapter_of(s, slot, to_host)
        parts = {name: wide(x[rows]) @ adapter[name][0].T @ adapter[name][1].T for name in "qkv"}
        for actual, exact in (
            (got[rows], parts["q"]),
            (new[0], 1 + parts["k"]),
            (new[1], 1 + parts["v"]),
        ):
            np.testing.assert_allclose(
                wide(actual), exact, rtol=tolerance, atol=tolerance * np.abs(exact).max()
            )
    assert (to_host(s.manager.blocks)[:, :, 0] == 1).all()  # the other layer of the cache


def test_fused_qkv_lora_twice_adds_twice(device: DeviceRef, to_device: Any, to_host: Any) -> None:
    s = with_adapters(device)
    s.manager.blocks[...] = 0
    claim(s.manager, ["a"])
    collection, x = s.manager.fetch(["a"], [3]), to_device(s.tokens(30, 3))
    set_batch(s, [5], [3])
    s.layer.fused_qkv_lora(x, collection, offsets(3), 1)
    once = cached(s, "a", to_host).copy()
    s.layer.fused_qkv_lora(x, collection, offsets(3), 1)
    np.testing.assert_array_equal(cached(s, "a", to_host), 2 * once)
    assert once.any()


def test_fused_qkv_lora_heeds_slot_ranks_and_biases(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    s = with_adapters(device, linear_cls=partial(LinearLoRA, has_lora_bias=True))
    s.manager.blocks[...] = 0
    biases = []
    for i, lora in enumerate(s.layer.qkv_loras):
        lora.set_slot_rank(0, i + 1)
        biases.append(normal(50 + i, lora.out_dim))
        lora.state_dict()["lora.bias"][0] = to_device(biases[i])
    claim(s.manager, ["a"])
    collection, x = s.manager.fetch(["a"], [3]), s.tokens(30, 3)
    set_batch(s, [0], [3])
    q = to_host(s.layer.fused_qkv_lora(to_device(x), collection, offsets(3), 1))
    k, v = cached(s, "a", to_host)
    for i, (name, actual) in enumerate((("q", q), ("k", k), ("v", v))):
        a, b = adapter_of(s, 0, to_host)[name]
        exact = wide(x) @ a[: i + 1].T @ b[:, : i + 1].T + biases[i]
        np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)


def test_fused_qkv_lora_needs_info_and_lora_layers(device: DeviceRef, to_device: Any) -> None:
    s = with_adapters(device)
    claim(s.manager, ["a"])
    collection, x = s.manager.fetch(["a"], [3]), to_device(s.tokens(30, 3))
    with pytest.raises(ValueError, match="set_lora_batch_info must be called on q_proj"):
        s.layer.fused_qkv_lora(x, collection, offsets(3), 1)
    set_batch(s, [5], [4])
    with pytest.raises(ValueError, match="lora_grouped_offsets must end at most 3"):
        s.layer.fused_qkv_lora(x, collection, offsets(3), 1)
    s.layer.k_proj = Linear(40, 32, DType.float32, device)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="k_proj must be a LinearLoRA, got Linear"):
        s.layer.fused_qkv_lora(x, collection, offsets(3), 1)


# ---- Structure -----------------------------------------------------------------------------------

ADAPTER_NAMES = {
    f"{p}_proj.{name}" for p in "qkvo" for name in ("lora_A.weight", "lora_B.weight", "lora.bias")
}


@pytest.mark.parametrize("stacked_qkv", [False, True])
def test_state_dict_names(device: DeviceRef, stacked_qkv: bool) -> None:
    make = partial(LinearLoRA, has_lora_bias=True)
    s = setup(device, linear_cls=make, has_bias=True, stacked_qkv=stacked_qkv)
    base = {"qkv_proj"} if stacked_qkv else {"q_proj", "k_proj", "v_proj"}
    assert set(s.layer.state_dict()) == ADAPTER_NAMES | {"o_proj.weight"} | {
        f"{name}.{kind}" for name in base for kind in ("weight", "bias")
    }


def test_slots_and_ranks_reach_the_projections(device: DeviceRef) -> None:
    def sizes(**options: Any) -> set[tuple[int, int]]:
        layer = setup(device, **options).layer
        return {(p.max_num_loras, p.max_lora_rank) for p in [*layer.qkv_loras, layer.o_proj]}

    assert sizes() == {(8, 16)}
    assert sizes(max_num_loras=3, max_lora_rank=5) == {(3, 5)}
    assert sizes(linear_cls=partial(LinearLoRA, max_num_loras=2), max_lora_rank=5) == {(2, 5)}
    both = partial(LinearLoRA, max_num_loras=2, max_lora_rank=4)
    assert sizes(linear_cls=both, max_num_loras=3, max_lora_rank=5) == {(2, 4)}

    class Fixed(LinearLoRA):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(max_num_loras=6, max_lora_rank=7, **arguments)

    assert sizes(linear_cls=Fixed) == {(6, 7)}
    with pytest.raises(ValueError, match="max_lora_rank must be at least 1"):
        setup(device, max_lora_rank=0)


def test_qkv_loras(device: DeviceRef) -> None:
    layer = setup(device).layer
    assert layer.qkv_loras == [layer.q_proj, layer.k_proj, layer.v_proj]
    plain = setup(device, linear_cls=Linear).layer
    with pytest.raises(ValueError, match="q_proj must be a LinearLoRA, got Linear"):
        _ = plain.qkv_loras
    with pytest.raises(ValueError, match="o_proj must be a LinearLoRA"):
        plain.set_lora_batch_info(*build_lora_batch([0], offsets(3), [4]))
    assert not isinstance(layer, SupportsLoRA)
    assert isinstance(layer, AttentionWithRope)


def test_setting_info_sets_all_four_or_none(device: DeviceRef) -> None:
    layer: AttentionWithRopeAndLoRA = setup(device).layer
    layer.set_lora_batch_info(*build_lora_batch([1], offsets(3), [4, 4]))
    infos = [p.batch_info for p in [*layer.qkv_loras, layer.o_proj]]
    assert infos[0] is not None
    assert all(info is infos[0] for info in infos)  # copied to the device once
    with pytest.raises(ValueError, match="lora_ids must be below max_num_loras = 8, got 8"):
        layer.set_lora_batch_info(*build_lora_batch([8], offsets(3), {8: 4}))
    assert all(p.batch_info is infos[0] for p in [*layer.qkv_loras, layer.o_proj])


def test_a_route_for_all_four(device: DeviceRef, to_device: Any, to_host: Any) -> None:
    results = []
    for shared in (False, True):
        s = with_adapters(device)
        x = s.tokens(30, 9)
        claim(s.manager, ["a", "b"])
        batch = build_lora_batch([2, 0], offsets(5, 4), RANKS, device=device)
        route = ops.sgmv_route(to_device(x), *batch, max_num_loras=8) if shared else None
        s.layer.set_lora_batch_info(*batch, route=route)
        (a, b) = run(s, ["a", "b"], [x[:5], x[5:]], to_device, to_host)
        collection = s.manager.fetch(["a", "b"], [5, 4])
        s.manager.blocks[...] = 1
        delta = s.layer.fused_qkv_lora(to_device(x), collection, offsets(5, 4), 1)
        results.append((a, b, to_host(delta), cached(s, "b", to_host)))
    for alone, with_route in zip(*results, strict=True):
        assert alone.tobytes() == with_route.tobytes()


def test_a_route_that_does_not_fit_is_refused_before_the_cache(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    s = with_adapters(device)
    x = s.tokens(30, 5)
    claim(s.manager, ["a"])
    batch = build_lora_batch([2], offsets(5), RANKS, device=device)
    for projection in ("o_proj", "q_proj"):
        s.layer.set_lora_batch_info(*batch)
        route = ops.sgmv_route(to_device(x), *batch, max_num_loras=99)
        getattr(s.layer, projection).set_lora_batch_info(*batch, route=route)
        before = to_host(s.manager.blocks).copy()
        with pytest.raises(ValueError, match="route must be made for max_num_loras = 8, got 99"):
            run(s, ["a"], [x], to_device, to_host)
        assert to_host(s.manager.blocks).tobytes() == before.tobytes()


def test_ids_must_be_slots_of_all_four(device: DeviceRef) -> None:
    """The device would take a slot that one projection lacks for base rows there."""

    def make(**arguments: Any) -> LinearLoRA:
        is_output = arguments["out_dim"] == 40
        return LinearLoRA(max_num_loras=2 if is_output else 8, max_lora_rank=4, **arguments)

    layer = setup(device, linear_cls=make).layer
    assert layer.o_proj.max_num_loras == 2
    with pytest.raises(ValueError, match="lora_ids must be below max_num_loras = 2, got 5"):
        layer.set_lora_batch_info(*build_lora_batch([5], offsets(3), {5: 4}))


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_an_output_projection_that_does_not_fit_is_seen_before_the_cache_is_written(
    device: DeviceRef, to_device: Any, to_host: Any, name: str
) -> None:
    s = with_adapters(device)
    s.layer.set_lora_batch_info(*build_lora_batch([0], offsets(5), RANKS))
    good = getattr(s.layer.o_proj, name)
    setattr(s.layer.o_proj, name, good[..., : good.shape[-1] // 2, :-1])
    claim(s.manager, ["a"])
    with pytest.raises(ValueError, match=f"o_proj.{name}"):
        run(s, ["a"], [s.tokens(30, 5)], to_device, to_host)
    setattr(s.layer.o_proj, name, good.astype(np.float16))
    with pytest.raises(TypeError, match=f"o_proj.{name} must be float32, got float16"):
        run(s, ["a"], [s.tokens(30, 5)], to_device, to_host)
    assert np.isnan(to_host(s.manager.blocks)).all()


def test_a_call_without_a_cache(device: DeviceRef, to_device: Any) -> None:
    s = with_adapters(device)
    nothing: Any = None
    words = "kv_collection must be a PagedKVCacheCollection or PagedKVCacheLayers, got NoneType"
    with pytest.raises(TypeError, match=words):
        s.layer(0, to_device(normal(1, 5, 40)), nothing, s.rope.freqs_cis, offsets(5))


@pytest.mark.parametrize("which", ["q_proj", "o_proj"])
def test_groups_past_the_rows_write_nothing(
    device: DeviceRef, to_device: Any, to_host: Any, which: str
) -> None:
    s = with_adapters(device)
    getattr(s.layer, which).set_lora_batch_info(*build_lora_batch([0], offsets(6), RANKS))
    claim(s.manager, ["a"])
    with pytest.raises(ValueError, match="lora_grouped_offsets must end at most 5"):
        run(s, ["a"], [s.tokens(30, 5)], to_device, to_host)
    assert np.isnan(to_host(s.manager.blocks)).all()
