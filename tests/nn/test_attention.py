"""The attention layer without adapters, against an oracle in float64."""

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
    KVCacheParams,
    KVCacheStrategy,
    Linear,
    RotaryEmbedding,
)
from tests.nn.helpers import (
    STORAGE,
    Setup,
    assert_within_budget,
    claim,
    normal,
    offsets,
    rounding,
    setup,
    wide,
)

SINKS = np.array([0.5, -1.0, 2.0, 0.0, 3.0, -np.inf], np.float32)


def run(
    s: Setup, requests: list[str], rows: list[Any], to_device: Any, to_host: Any, layer: Any = None
) -> list[Any]:
    """One step of a batch; a result for each request."""
    lengths = [len(r) for r in rows]
    collection = s.manager.fetch(requests, lengths)
    x = np.concatenate(rows)
    y = (layer or s.layer)(1, to_device(x), collection, s.rope.freqs_cis, offsets(*lengths))
    s.manager.step(requests)
    assert y.shape == (sum(lengths), s.hidden)
    assert y.dtype == s.dtype.to_numpy()
    return np.split(to_host(y), np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"interleaved": False, "has_bias": True}, id="half pairs, biases"),
        pytest.param({"scale": 0.0}, id="scale 0"),
        pytest.param({"scale": 0.7, "n_kv_heads": 6, "page_size": 1}, id="scale, MHA, pages of 1"),
        pytest.param({"n_kv_heads": 1, "head_dim": 8, "page_size": 16}, id="MQA, head_dim 8"),
        pytest.param({"stacked_qkv": True, "has_bias": True}, id="stacked"),
        pytest.param({"window": (3, None)}, id="window"),
        pytest.param({"window": (0, 2), "soft_cap": 0.5}, id="own key, which cannot be capped"),
        pytest.param({"soft_cap": 0.3, "scale": 1.0}, id="soft cap"),
        pytest.param({"sinks": SINKS}, id="sinks"),
        pytest.param({"window": (4, None), "soft_cap": 0.7, "sinks": SINKS}, id="all options"),
    ],
)
@pytest.mark.parametrize("layer_cls", [AttentionWithRope, AttentionWithRopeAndLoRA])
def test_prefill_then_decode(
    device: DeviceRef,
    to_device: Any,
    to_host: Any,
    dtype: DType,
    options: dict[str, Any],
    layer_cls: type[Any],
) -> None:
    s = setup(device, dtype, layer_cls=layer_cls, **options)
    requests, lengths = ["a", "b", "c"], [7, 1, 4]
    claim(s.manager, requests)
    xs = [s.tokens(30 + i, n + 3) for i, n in enumerate(lengths)]
    got = [run(s, requests, [x[:n] for x, n in zip(xs, lengths, strict=True)], to_device, to_host)]
    for step in range(3):  # one token each, after caches of different lengths
        rows = [x[n + step : n + step + 1] for x, n in zip(xs, lengths, strict=True)]
        got.append(run(s, requests, rows, to_device, to_host))
    for i, x in enumerate(xs):
        y = np.concatenate([step[i] for step in got])
        assert_within_budget(y, s.model.rows(x), s.model.rows(x, dtype=dtype))


def test_prefill_in_chunks_agrees_with_one_prefill(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    s, x = setup(device), normal(30, 11, 40)
    claim(s.manager, ["whole", "chunks"])
    (whole,) = run(s, ["whole"], [x], to_device, to_host)
    chunks = [
        run(s, ["chunks"], [x[a:b]], to_device, to_host)[0] for a, b in ((0, 5), (5, 6), (6, 11))
    ]
    np.testing.assert_allclose(np.concatenate(chunks), whole, rtol=1e-5, atol=1e-5)


def test_sequences_without_tokens_and_an_empty_batch(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    s, x = setup(device), normal(30, 4, 40)
    claim(s.manager, ["a", "b"])
    first, second = run(s, ["a", "b"], [x[:0], x], to_device, to_host)
    assert first.shape == (0, 40)
    assert_within_budget(second, s.model.rows(x), s.model.rows(x))
    empty = s.manager.fetch([], [])
    y = s.layer(0, to_device(x[:0]), empty, s.rope.freqs_cis, offsets())
    assert y.shape == (0, 40)


def test_only_this_layer_and_these_positions_of_the_cache_are_written(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    s = setup(device)
    claim(s.manager, ["a"])
    run(s, ["a"], [s.tokens(1, 4)], to_device, to_host)
    written = ~np.isnan(to_host(s.manager.blocks)).any(axis=(-1, -2))  # page, kv, layer, slot
    expected = np.zeros_like(written)
    first, second = s.manager.get_req_blocks("a")
    expected[first, :, 1, :3] = expected[second, :, 1, :1] = True
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("partial_rotation", [{}, {"rotate_last": True}])
def test_partial_rotation_and_metadata_types(
    device: DeviceRef, to_device: Any, to_host: Any, partial_rotation: dict[str, bool]
) -> None:
    """A table narrower than a head: the unrotated elements of cached keys are the projection's."""
    s = setup(device)
    rope = RotaryEmbedding(96, 6, 1e4, 64, device, head_dim=6, **partial_rotation)
    s.layer.rope, x = rope, s.tokens(3, 5)
    claim(s.manager, ["a"])
    collection = s.manager.fetch(["a"], [5])
    s.layer(np.uint32(1), to_device(x), collection, rope.freqs_cis, offsets(5).astype(np.int32))
    keys = to_host(s.manager.blocks)[s.manager.get_req_blocks("a"), 0, 1].reshape(6, 2, 16)[:5]
    plain = (wide(x) @ s.model.weights["k"].T).reshape(5, 2, 16)
    kept = slice(0, 10) if partial_rotation else slice(6, 16)
    turned = slice(10, 16) if partial_rotation else slice(0, 6)
    np.testing.assert_allclose(keys[..., kept], plain[..., kept], rtol=1e-5, atol=1e-6)
    assert np.abs(keys[1:, :, turned] - plain[1:, :, turned]).max() > 0.1
    np.testing.assert_allclose(keys[0], plain[0], rtol=1e-5, atol=1e-6)  # position 0


# ---- Weights -------------------------------------------------------------------------------------


def test_state_dict_names(device: DeviceRef) -> None:
    bases = [f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    plain = setup(device, layer_cls=AttentionWithRope, has_bias=True)
    assert list(plain.layer.state_dict()) == [*bases, "o_proj.weight"]
    stacked = setup(device, layer_cls=AttentionWithRope, has_bias=True, stacked_qkv=True)
    assert sorted(stacked.layer.state_dict()) == [
        "o_proj.weight",
        "qkv_proj.bias",
        "qkv_proj.weight",
    ]
    assert stacked.layer.state_dict()["qkv_proj.weight"].shape == (96 + 64, 40)
    assert stacked.layer.state_dict()["qkv_proj.bias"].shape == (96 + 64,)


@pytest.mark.parametrize("stacked_qkv", [False, True])
def test_wqkv_is_the_memory_of_the_three_weights(
    device: DeviceRef, to_host: Any, stacked_qkv: bool
) -> None:
    s = setup(device, has_bias=True, stacked_qkv=stacked_qkv)
    np.testing.assert_array_equal(
        to_host(s.layer.wqkv), np.concatenate([s.model.weights[p] for p in "qkv"])
    )
    np.testing.assert_array_equal(
        to_host(s.layer.wqkv_bias), np.concatenate([s.model.biases[p] for p in "qkv"])
    )
    s.layer.k_proj.weight[1, 2] = 77
    s.layer.state_dict()["qkv_proj.bias" if stacked_qkv else "v_proj.bias"][-1] = 78
    assert to_host(s.layer.wqkv)[96 + 1, 2] == 77
    assert to_host(s.layer.wqkv_bias)[-1] == to_host(s.layer.v_proj.bias)[-1] == 78
    assert s.layer.wqkv is s.layer.wqkv
    assert setup(device).layer.wqkv_bias is None


def test_a_replaced_weight_counts(device: DeviceRef, to_device: Any, to_host: Any) -> None:
    s, x = setup(device, has_bias=True), normal(30, 4, 40)
    s.model.weights["k"] = wide(normal(99, 32, 40))
    s.model.biases["q"] = wide(normal(98, 96))
    s.layer.k_proj.weight = to_device(s.model.weights["k"].astype("f4"))
    s.layer.q_proj.bias = to_device(s.model.biases["q"].astype("f4"))
    claim(s.manager, ["a"])
    (y,) = run(s, ["a"], [x], to_device, to_host)
    assert_within_budget(y, s.model.rows(x), s.model.rows(x))


def test_a_replaced_weight_that_does_not_fit(device: DeviceRef, to_device: Any) -> None:
    layer = setup(device).layer
    for value, error, words in (
        (normal(9, 32, 40).astype(np.float16), TypeError, "k_proj.weight must be float32, got"),
        (normal(9, 31, 40), ValueError, r"k_proj.weight must have shape \[32, 40\], got"),
    ):
        layer.k_proj.weight = to_device(value)
        with pytest.raises(error, match=words):
            _ = layer.wqkv


@pytest.mark.parametrize("replaced", ["q_proj", "qkv_proj"])
def test_a_stacked_weight_is_written_and_not_replaced(device: DeviceRef, replaced: str) -> None:
    """Else its name in the state dict and its slices would hold different values."""
    layer = setup(device, stacked_qkv=True).layer
    projection = getattr(layer, replaced)
    projection.weight = projection.weight.copy()
    with pytest.raises(ValueError, match=r"must stay slices of qkv_proj\.weight"):
        _ = layer.wqkv


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("clip", [0.0, 0.15])
@pytest.mark.parametrize("stacked_qkv", [False, True])
def test_clip_qkv_clamps_base_weights_of_q_k_v_only(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType, clip: float, stacked_qkv: bool
) -> None:
    s = setup(device, dtype, has_bias=True, clip_qkv=clip, stacked_qkv=stacked_qkv)
    for name in "qkv":
        assert np.abs(s.model.weights[name]).max() > 2 * clip
        s.model.weights[name] = rounding(dtype)(np.clip(s.model.weights[name], -clip, clip))
    x = s.tokens(30, 5)
    claim(s.manager, ["a"])
    (y,) = run(s, ["a"], [x], to_device, to_host)
    assert_within_budget(y, s.model.rows(x), s.model.rows(x, dtype=dtype))


def test_values_that_linear_cls_sets_are_kept(device: DeviceRef, to_host: Any) -> None:
    class Filled(Linear):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.weight[...] = self.out_dim

    rope = RotaryEmbedding(96, 6, 1e4, 64, device)
    layer = AttentionWithRope(
        rope=rope,
        num_attention_heads=6,
        num_key_value_heads=2,
        hidden_size=40,
        kv_params=KVCacheParams(DType.float32, 2, 16, page_size=3),
        devices=[device],
        linear_cls=Filled,
    )
    assert to_host(layer.wqkv)[:, 0].tolist() == [96] * 96 + [32] * 64


def test_linear_cls_makes_all_four(device: DeviceRef) -> None:
    calls: list[dict[str, Any]] = []

    def make(**arguments: Any) -> Linear:
        calls.append(arguments)
        return Linear(**arguments)

    layer = setup(device, layer_cls=AttentionWithRope, linear_cls=make, has_bias=True).layer
    assert [set(call) for call in calls] == [
        {"in_dim", "out_dim", "dtype", "device", "has_bias", "float8_config"}
    ] * 3 + [{"in_dim", "out_dim", "dtype", "device", "float8_config"}]
    assert [(call["in_dim"], call["out_dim"]) for call in calls] == [
        (40, 96),
        (40, 32),
        (40, 32),
        (96, 40),
    ]
    assert layer.o_proj.bias is None


def test_clip_weight_of_a_projection_counts(
    device: DeviceRef, to_device: Any, to_host: Any
) -> None:
    s = setup(device, linear_cls=partial(Linear, clip_weight=0.1))
    for name, weight in s.model.weights.items():
        s.model.weights[name] = np.clip(weight, -np.float32(0.1), np.float32(0.1))
    x = s.tokens(30, 5)
    claim(s.manager, ["a"])
    (y,) = run(s, ["a"], [x], to_device, to_host)
    assert_within_budget(y, s.model.rows(x), s.model.rows(x))


def test_attributes(device: DeviceRef) -> None:
    layer = setup(device).layer
    assert layer.scale == 16**-0.5
    assert setup(device, scale=0.0).layer.scale == 0.0
    assert (layer.window, layer.soft_cap, layer.sinks) == ((None, None), None, None)
    with_options = setup(device, window=[np.int64(3), None], soft_cap=2, sinks=SINKS).layer
    assert (with_options.window, with_options.soft_cap) == ((3, None), 2.0)
    assert "sinks" not in with_options.state_dict()
    assert (layer.n_heads, layer.q_weight_dim, layer.kv_weight_dim) == (6, 96, 32)
    assert layer.devices == [device]
    assert layer.qkv_input_scale is None
    with pytest.raises(ValueError, match="qkv_weight_scale needs a float8_config"):
        _ = layer.qkv_weight_scale


@pytest.mark.parametrize("layer_cls", [AttentionWithRope, AttentionWithRopeAndLoRA])
@pytest.mark.parametrize("dtype", STORAGE)
def test_sinks_in_the_dtype_of_the_layer(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType, layer_cls: type[Any]
) -> None:
    s = setup(device, dtype, layer_cls=layer_cls, sinks=SINKS.astype(dtype.to_numpy()))
    x = s.tokens(30, 5)
    claim(s.manager, ["a"])
    (y,) = run(s, ["a"], [x], to_device, to_host)
    assert_within_budget(y, s.model.rows(x), s.model.rows(x, dtype=dtype))


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sinks", "error", "words"),
    [
        (np.zeros(5, np.float32), ValueError, r"sinks must have shape \[6\], got \(5,\)"),
        (np.zeros((6, 1), np.float32), ValueError, r"sinks must have shape \[6\], got \(6, 1\)"),
        (np.zeros(6, np.float64), TypeError, "sinks must be float32, got float64"),
        (np.zeros(6, np.float16), TypeError, "sinks must be float32, got float16"),
    ],
)
def test_sinks_that_are_refused(
    device: DeviceRef, sinks: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        setup(device, sinks=sinks)


@pytest.mark.parametrize("layer_cls", [AttentionWithRope, AttentionWithRopeAndLoRA])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"float8_config": object()}, NotImplementedError, "float8_config"),
        ({"devices": [DeviceRef.CPU()] * 2}, NotImplementedError, "devices must name one"),
        ({"num_attention_heads": 5}, ValueError, "num_attention_heads must be a multiple"),
        (
            {"num_key_value_heads": 3},
            ValueError,
            "num_key_value_heads must be kv_params",
        ),
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1"),
        ({"dtype": DType.float16}, ValueError, "dtype must be kv_params.dtype"),
        ({"rope": None}, TypeError, "rope must be a RotaryEmbedding"),
        ({"kv_params": None}, TypeError, "kv_params must be KVCacheParams"),
        ({"scale": float("nan")}, ValueError, "scale must be None or finite"),
        ({"scale": "1"}, TypeError, "scale must be a number, got"),
        ({"clip_qkv": "1"}, TypeError, "clip_qkv must be a number, got"),
        ({"clip_qkv": -0.5}, ValueError, "clip_qkv must be None or at least 0"),
        ({"window": 4}, TypeError, "window must be None or a pair"),
        ({"window": (-1, None)}, ValueError, "window must not be negative, got -1 on the left"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap must be None or positive and finite"),
        ({"soft_cap": "1"}, TypeError, "soft_cap must be a number, got str"),
        ({"sinks": [0.0] * 6}, TypeError, "sinks must be an array on .*, got builtins.list"),
        ({"linear_cls": lambda **arguments: object()}, TypeError, "linear_cls must return"),
        (
            {"linear_cls": lambda **a: Linear(a["in_dim"], 1, a["dtype"], a["device"])},
            ValueError,
            r"linear_cls must return a layer .* weight \(96, 40\), got .* weight \(1, 40\)",
        ),
        (
            {
                "kv_params": KVCacheParams(
                    DType.float32, 2, 16, cache_strategy=KVCacheStrategy("model_default")
                )
            },
            ValueError,
            "kv_params must be PAGED",
        ),
    ],
)
def test_constructor_refusals(
    device: DeviceRef,
    layer_cls: type[Any],
    change: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    arguments: dict[str, Any] = {
        "rope": RotaryEmbedding(96, 6, 1e4, 64, device),
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_size": 40,
        "kv_params": KVCacheParams(DType.float32, 2, 16, page_size=3),
        "devices": [device],
    }
    layer_cls(**arguments)
    with pytest.raises(error, match=words):
        layer_cls(**(arguments | change))


@pytest.mark.parametrize(
    ("arguments", "change", "error", "words"),
    [
        ({"layer_idx": 2}, None, ValueError, r"layer_idx must be in \[0, 2\), got 2"),
        ({"layer_idx": -1}, None, ValueError, "layer_idx must be in"),
        ({"layer_idx": 1.0}, None, TypeError, "layer_idx must be an integer on the host"),
        ({"x": normal(1, 5, 41)}, None, ValueError, r"x must have shape \[total_tokens, 40\]"),
        ({"x": normal(1, 1, 5, 40)}, None, ValueError, "x must have shape"),
        ({"x": normal(1, 5, 40).astype("f2")}, None, TypeError, "x must be float32, got float16"),
        ({"x": normal(1, 40, 5).T}, None, ValueError, "x must be C-contiguous"),
        ({"freqs_cis": np.zeros((64, 16))}, None, TypeError, "freqs_cis must be float32"),
        ({"freqs_cis": np.zeros((64, 18), "f4")}, None, ValueError, "freqs_cis must have an even"),
        ({"freqs_cis": np.zeros((64, 15), "f4")}, None, ValueError, "freqs_cis must have an even"),
        ({"freqs_cis": np.zeros((64, 8, 2), "f4")}, None, ValueError, "freqs_cis must have shape"),
        ({"freqs_cis": np.zeros((4, 16), "f4")}, None, ValueError, "row for each of 5 positions"),
        (
            {"input_row_offsets": offsets(5, 0)},
            None,
            ValueError,
            "cache_lengths has batch_size = 1",
        ),
        ({"input_row_offsets": offsets(4)}, None, ValueError, "input_row_offsets must end at 5"),
        ({"input_row_offsets": np.array([0, 5])}, None, TypeError, "input_row_offsets must be uin"),
        ({}, {"lookup_table": np.full((1, 2), 70, "u4")}, ValueError, r"pages in \[0, 70\)"),
        (
            {},
            {"lookup_table": np.zeros((1, 1), "u4")},
            ValueError,
            "lookup_table must have 2 pages",
        ),
        ({}, {"cache_lengths": np.zeros(1, "i8")}, TypeError, "cache_lengths must be uint32"),
        ({}, {"blocks": np.zeros((9, 2, 2, 3, 2, 16), "f2")}, TypeError, "blocks must be float32"),
        ({}, {"blocks": np.zeros((9, 2, 2, 4, 2, 16), "f4")}, ValueError, "blocks must have shape"),
    ],
)
def test_call_refusals_write_nothing(
    device: DeviceRef,
    to_device: Any,
    to_host: Any,
    arguments: dict[str, Any],
    change: dict[str, Any] | None,
    error: type[Exception],
    words: str,
) -> None:
    s = setup(device)
    claim(s.manager, ["a"])
    collection = s.manager.fetch(["a"], [5])
    collection.cache_lengths = to_host(collection.cache_lengths)  # what the host sees is checked
    collection.lookup_table = to_host(collection.lookup_table)
    call: dict[str, Any] = {
        "layer_idx": 1,
        "x": normal(1, 5, 40),
        "freqs_cis": to_host(s.rope.freqs_cis),
        "input_row_offsets": offsets(5),
    } | arguments
    call["x"], call["freqs_cis"] = to_device(call["x"]), to_device(call["freqs_cis"])
    for name, array in (change or {}).items():
        setattr(collection, name, to_device(array) if name == "blocks" else array)
    with pytest.raises(error, match=words):
        s.layer(kv_collection=collection, **call)
    assert np.isnan(to_host(s.manager.blocks)).all()
