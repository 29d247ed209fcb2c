"""The plain layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorakit import DeviceRef, DType, Linear
from tests.nn.helpers import STORAGE, assert_within_budget, normal, rounding, wide


def layer_and_weights(
    device: DeviceRef, dtype: DType = DType.float32, **arguments: Any
) -> tuple[Linear, dict[str, Any]]:
    layer = Linear(24, 16, dtype, device, **arguments)
    state = {
        name: normal(i, *array.shape, dtype=dtype)
        for i, (name, array) in enumerate(layer.state_dict().items())
    }
    layer.load_state_dict(state)
    return layer, state


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("has_bias", [False, True])
def test_product(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType, has_bias: bool
) -> None:
    layer, state = layer_and_weights(device, dtype, has_bias=has_bias)
    x = normal(5, 7, 24, dtype=dtype)
    exact = wide(x) @ wide(state["weight"]).T + (wide(state["bias"]) if has_bias else 0.0)
    y = to_host(layer(to_device(x)))
    assert y.dtype == dtype.to_numpy()
    assert_within_budget(y, exact, rounding(dtype)(exact))


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 3, 24), (2, 0, 24), (1, 1, 1, 24)])
def test_leading_axes(
    device: DeviceRef, to_device: Any, to_host: Any, shape: tuple[int, ...]
) -> None:
    layer, state = layer_and_weights(device)
    x = normal(5, *shape)
    y = to_host(layer(to_device(x)))
    assert y.shape == (*shape[:-1], 16)
    np.testing.assert_allclose(y, x @ state["weight"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_clip_weight_clamps_the_product_only(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType, clip: float
) -> None:
    layer, state = layer_and_weights(device, dtype, has_bias=True, clip_weight=clip)
    x = normal(5, 7, 24, dtype=dtype)
    clamped = rounding(dtype)(np.clip(wide(state["weight"]), -clip, clip))
    assert np.abs(wide(state["weight"])).max() > 1 > clip
    exact = wide(x) @ clamped.T + wide(state["bias"])
    assert_within_budget(to_host(layer(to_device(x))), exact, rounding(dtype)(exact))
    np.testing.assert_array_equal(to_host(layer.weight), state["weight"])


def test_weights_start_as_zeros_and_are_named(device: DeviceRef, to_host: Any) -> None:
    layer = Linear(3, 2, DType.float16, device, True, name="up")
    state = layer.state_dict()
    assert list(state) == ["up.weight", "up.bias"]
    assert [array.shape for array in state.values()] == [(2, 3), (2,)]
    for array in state.values():
        assert array.dtype == np.float16
        assert not to_host(array).any()
    assert Linear(3, 2, DType.float16, device).bias is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"in_dim": 0}, ValueError, "in_dim must be at least 1, got 0"),
        ({"out_dim": 2.0}, TypeError, "out_dim must be an integer"),
        ({"dtype": np.float32}, TypeError, "dtype must be a lorakit.DType"),
        ({"dtype": DType.float64}, ValueError, "dtype must be one of .*, got float64"),
        ({"device": "cpu"}, TypeError, "device must be a lorakit.DeviceRef, got 'cpu'"),
        ({"clip_weight": "1"}, TypeError, "clip_weight must be a number, got"),
        ({"clip_weight": -1.0}, ValueError, "clip_weight must be None or at least 0, got -1.0"),
        ({"clip_weight": float("nan")}, ValueError, "clip_weight must be None or at least 0"),
        ({"quantization_encoding": "Q4_0"}, NotImplementedError, "quantization_encoding"),
        ({"float8_config": object()}, NotImplementedError, "float8_config"),
    ],
)
def test_constructor_refusals(
    device: DeviceRef, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments: dict[str, Any] = {
        "in_dim": 3,
        "out_dim": 2,
        "dtype": DType.float32,
        "device": device,
    }
    with pytest.raises(error, match=words):
        Linear(**(arguments | change))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (
            np.zeros((2, 5), "f4"),
            ValueError,
            r"x must have shape \[..., in_dim = 24\], got",
        ),
        (np.zeros((), "f4"), ValueError, "x must have shape"),
        (np.zeros((2, 24), "f8"), TypeError, "x must be float32, got float64"),
        (np.zeros((24, 2), "f4").T, ValueError, "x must be C-contiguous"),
    ],
)
def test_call_refusals(
    device: DeviceRef, to_device: Any, x: Any, error: type[Exception], words: str
) -> None:
    layer, _ = layer_and_weights(device)
    with pytest.raises(error, match=words):
        layer(to_device(x))
