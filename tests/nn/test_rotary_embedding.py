"""Rotary tables against their formulas, pair by pair in plain Python."""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np
import pytest

from lorakit import (
    DeviceRef,
    DType,
    DynamicRotaryEmbedding,
    LinearRotaryEmbedding,
    LinearScalingParams,
    Llama3RopeScalingParams,
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YarnRotaryEmbedding,
    YarnScalingParams,
)
from tests.nn.helpers import STORAGE, assert_within_budget, normal, rounding, wide

POSITIONS = (0, 1, 2, 77, 150)


def check_table(
    rope: RotaryEmbedding, to_host: Any, freqs: list[float], magnitude: float = 1.0
) -> None:
    """Rows of the table are magnitude * (cos, sin) of position * frequency, rounded to float32."""
    table = to_host(rope.freqs_cis)
    assert table.dtype == np.float32
    assert table.shape[1] == 2 * len(freqs)
    for position in POSITIONS:
        for pair, freq in enumerate(freqs):
            turn = magnitude * cmath.exp(1j * position * freq)
            assert abs(complex(*map(float, table[position, 2 * pair : 2 * pair + 2])) - turn) < 2e-7


def plain(theta: float, dim: int) -> list[float]:
    return [1 / theta ** (2 * i / dim) for i in range(dim // 2)]


def test_plain_table(device: DeviceRef, to_host: Any) -> None:
    rope = RotaryEmbedding(64, 4, 10000.0, 100, device)
    assert rope.head_dim == 16
    assert rope.freqs_cis.shape == (200, 16)
    assert rope.freqs_cis is rope.freqs_cis
    check_table(rope, to_host, plain(10000.0, 16))


def test_angles_are_computed_in_float64(device: DeviceRef, to_host: Any) -> None:
    """At position 2**17 a float32 angle would be off by up to 2**-8."""
    rope = RotaryEmbedding(8, 1, 10000.0, 70000, device)
    row = to_host(rope.freqs_cis)[131071]
    for pair, freq in enumerate(plain(10000.0, 8)):
        assert row[2 * pair] == np.float32(math.cos(131071 * freq))
        assert row[2 * pair + 1] == np.float32(math.sin(131071 * freq))


def test_head_dim_scale_and_base(device: DeviceRef, to_host: Any) -> None:
    rope = RotaryEmbedding(64, 4, 10000.0, 100, device, head_dim=6)
    assert rope.freqs_cis.shape == (200, 6)
    base = rope.freqs_cis_base()
    assert base.shape == (200, 3, 2)
    np.testing.assert_array_equal(to_host(base).reshape(200, 6), to_host(rope.freqs_cis))
    assert rope.freqs_cis_base().shape == (200, 3, 2)  # the second time too
    assert rope.compute_scale() == 6**-0.5
    assert rope.compute_scale(0.0) == 0.0
    assert rope.compute_scale(0.25) == 0.25


@pytest.mark.parametrize("shape", [(9, 6), (9, 3, 2)])
def test_a_given_table_is_used_as_it_is(
    device: DeviceRef, to_device: Any, to_host: Any, shape: tuple[int, ...]
) -> None:
    table = normal(1, *shape)
    rope = RotaryEmbedding(24, 4, 10000.0, 100, device, _freqs_cis=to_device(table))
    np.testing.assert_array_equal(to_host(rope.freqs_cis), table.reshape(9, 6))


def test_linear(device: DeviceRef, to_host: Any) -> None:
    rope = LinearRotaryEmbedding(
        64, 4, 10000.0, 100, device, scaling_params=LinearScalingParams(4.0)
    )
    assert rope.freqs_cis.shape == (200, 16)
    check_table(rope, to_host, [freq / 4 for freq in plain(10000.0, 16)])


def llama3(
    theta: float, dim: int, factor: float, low: float, high: float, orig: int
) -> list[float]:
    """Transformers' rule, one frequency at a time."""
    result = []
    for freq in plain(theta, dim):
        wavelength = 2 * math.pi / freq
        if wavelength < orig / high:
            result.append(freq)
        elif wavelength > orig / low:
            result.append(freq / factor)
        else:
            smooth = (orig / wavelength - low) / (high - low) if high > low else 0.0
            result.append((1 - smooth) * freq / factor + smooth * freq)
    return result


@pytest.mark.parametrize(
    ("dim", "theta", "params"),
    [
        pytest.param(128, 500000.0, (8.0, 1.0, 4.0, 8192), id="Llama 3.1"),
        pytest.param(64, 500000.0, (32.0, 1.0, 4.0, 8192), id="Llama 3.2"),
        pytest.param(16, 10000.0, (8.0, 2.0, 2.0, 64), id="no ramp"),
    ],
)
def test_llama3(device: DeviceRef, to_host: Any, dim: int, theta: float, params: Any) -> None:
    freqs = llama3(theta, dim, *params)
    ratio = np.array(plain(theta, dim)) / np.array(freqs)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(params[0])
    if params[1] < params[2]:
        assert ((ratio > 1.01) & (ratio < 0.99 * params[0])).any()  # the ramp is exercised
    rope = Llama3RotaryEmbedding(
        dim, 1, theta, 100, device, scaling_params=Llama3RopeScalingParams(*params)
    )
    assert rope.freqs_cis.shape == (200, dim)
    check_table(rope, to_host, freqs)


def test_llama3_without_params_is_plain(device: DeviceRef, to_host: Any) -> None:
    check_table(Llama3RotaryEmbedding(16, 1, 1e4, 100, device), to_host, plain(1e4, 16))


def yarn(theta: float, dim: int, params: YarnScalingParams) -> list[float]:
    """Transformers' rule, one pair at a time."""

    def pair_with(turns: float) -> float:
        orig = params.original_max_position_embeddings
        return dim * math.log(orig / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(params.beta_fast), pair_with(params.beta_slow)
    if params.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    result = []
    for pair, freq in enumerate(plain(theta, dim)):
        ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
        result.append(freq / params.factor * ramp + freq * (1 - ramp))
    return result


@pytest.mark.parametrize(
    ("dim", "theta", "params", "magnitude"),
    [
        pytest.param(
            128,
            1e6,
            YarnScalingParams(4.0, 32.0, 1.0, 32768, True),
            0.1 * math.log(4) + 1,
            id="Qwen 2.5",
        ),
        pytest.param(
            64,
            150000.0,
            YarnScalingParams(32.0, 32.0, 1.0, 4096, False),
            0.1 * math.log(32) + 1,
            id="gpt-oss, not truncated",
        ),
        pytest.param(
            64,
            1e4,
            YarnScalingParams(40.0, 32.0, 1.0, 4096, True, mscale=0.707, mscale_all_dim=1.0),
            (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1),
            id="DeepSeek magnitudes",
        ),
        pytest.param(
            64,
            1e4,
            YarnScalingParams(4.0, 32.0, 1.0, 512, True, attention_factor=1.5),
            1.5,
            id="attention factor",
        ),
        pytest.param(
            64,
            1e4,
            YarnScalingParams(4.0, 32.0, 1.0, 512, True, mscale=0.0, mscale_all_dim=1.0),
            0.1 * math.log(4) + 1,
            id="an mscale of 0 is unset",
        ),
        pytest.param(16, 1e4, YarnScalingParams(0.5, 32.0, 1.0, 512, True), 1.0, id="factor < 1"),
        pytest.param(
            16,
            1e4,
            YarnScalingParams(4.0, 8.0, 8.0, 512, False),
            0.1 * math.log(4) + 1,
            id="a step",
        ),
    ],
)
def test_yarn(
    device: DeviceRef,
    to_host: Any,
    dim: int,
    theta: float,
    params: YarnScalingParams,
    magnitude: float,
) -> None:
    rope = YarnRotaryEmbedding(dim, 1, theta, 151, device, scaling_params=params)
    assert rope.freqs_cis.shape == (151, dim)  # not doubled
    check_table(rope, to_host, yarn(theta, dim, params), magnitude)
    assert rope.compute_scale() == dim**-0.5


def test_yarn_truncation_matters(device: DeviceRef, to_host: Any) -> None:
    tables = [
        to_host(
            YarnRotaryEmbedding(
                64, 1, 1e4, 151, device, scaling_params=YarnScalingParams(4.0, 32, 1, 512, truncate)
            ).freqs_cis
        )
        for truncate in (True, False)
    ]
    assert np.abs(tables[0] - tables[1]).max() > 0.1


def test_dynamic_is_refused_with_the_reason(device: DeviceRef) -> None:
    with pytest.raises(NotImplementedError, match="changes the angles of cached keys"):
        DynamicRotaryEmbedding(64, 4, 1e4, 100, device)


# ---- Rotation without a cache --------------------------------------------------------------------


def rotated(x: Any, theta: float, start: int, interleaved: bool) -> Any:
    """``[batch, seq, heads, dim]``, one token and pair at a time."""
    dim, y = x.shape[-1], wide(x).copy()
    for t in range(x.shape[1]):
        for pair in range(dim // 2):
            i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + dim // 2)
            turn = cmath.exp(1j * (start + t) * theta ** (-2 * pair / dim))
            z = (wide(x)[:, t, :, i] + 1j * wide(x)[:, t, :, j]) * turn
            y[:, t, :, i], y[:, t, :, j] = z.real, z.imag
    return y


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("interleaved", [True, False])
def test_call(
    device: DeviceRef, to_device: Any, to_host: Any, dtype: DType, interleaved: bool
) -> None:
    rope = RotaryEmbedding(64, 4, 10000.0, 10, device, interleaved=interleaved)
    x = normal(1, 2, 5, 4, 16, dtype=dtype)
    exact = rotated(x, 10000.0, 15, interleaved)
    y = to_host(rope(to_device(x), start_pos=15))
    assert y.dtype == dtype.to_numpy()
    assert_within_budget(y, exact, rounding(dtype)(exact))
    assert np.abs(exact - wide(x)).max() > 0.5


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotate_last", [True, False])
def test_call_with_partial_rotation(
    device: DeviceRef, to_device: Any, to_host: Any, interleaved: bool, rotate_last: bool
) -> None:
    rope = RotaryEmbedding(
        64, 4, 1e4, 10, device, head_dim=6, interleaved=interleaved, rotate_last=rotate_last
    )
    x = normal(1, 2, 5, 4, 16)
    part = slice(10, 16) if rotate_last else slice(0, 6)
    exact = wide(x).copy()
    exact[..., part] = rotated(x[..., part], 1e4, 3, interleaved)
    y = to_host(rope(to_device(x), 3, 5))
    assert_within_budget(y, exact, exact)
    kept = slice(0, 10) if rotate_last else slice(6, 16)
    assert y[..., kept].tobytes() == x[..., kept].tobytes()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((normal(1, 2, 5, 4, 16), 16), ValueError, "start_pos must keep 5 tokens within 20 pos"),
        ((normal(1, 2, 5, 4, 16), -1), ValueError, "start_pos must keep"),
        ((normal(1, 2, 5, 4, 16), 0, 4), ValueError, "seq_len must be 5, the tokens in x, got 4"),
        ((normal(1, 2, 5, 4, 14),), ValueError, "x must have heads of at least 16 elements"),
        ((normal(1, 5, 4, 16),), ValueError, "x must have shape"),
        ((np.zeros((2, 5, 4, 16)),), TypeError, "x must be float32 or float16 or bfloat16"),
    ],
)
def test_call_refusals(
    device: DeviceRef, to_device: Any, arguments: Any, error: type[Exception], words: str
) -> None:
    rope = RotaryEmbedding(64, 4, 10000.0, 10, device)
    with pytest.raises(error, match=words):
        rope(to_device(arguments[0]), *arguments[1:])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"n_heads": 65}, ValueError, "head_dim must be at least 1, got 0"),
        ({"head_dim": 7}, ValueError, "head_dim must be even, got 7"),
        ({"theta": "1"}, TypeError, "theta must be a number, got"),
        ({"theta": 0.0}, ValueError, "theta must be positive, got 0.0"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len must be at least 1"),
        ({"device": "cpu"}, TypeError, "device must be a lorakit.DeviceRef"),
        ({"_freqs_cis": np.zeros((4, 16), "f8")}, TypeError, "_freqs_cis must be"),
        ({"_freqs_cis": np.zeros((4, 8), "f4")}, ValueError, "_freqs_cis must have shape"),
        ({"_freqs_cis": np.zeros((4, 4, 2), "f4")}, ValueError, "_freqs_cis must have shape"),
    ],
)
def test_constructor_refusals(
    device: DeviceRef,
    to_device: Any,
    change: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    arguments: dict[str, Any] = {
        "dim": 64,
        "n_heads": 4,
        "theta": 1e4,
        "max_seq_len": 10,
        "device": device,
    } | change
    if "_freqs_cis" in change:
        arguments["_freqs_cis"] = to_device(change["_freqs_cis"])
    with pytest.raises(error, match=words):
        RotaryEmbedding(**arguments)


def test_params_refusals(device: DeviceRef) -> None:
    with pytest.raises(ValueError, match="factor must be positive, got 0"):
        LinearScalingParams(0)
    with pytest.raises(ValueError, match=r"high_freq_factor must be at least low_freq_factor = 4"):
        Llama3RopeScalingParams(8.0, 4.0, 1.0, 8192)
    with pytest.raises(ValueError, match="beta_slow must be positive"):
        YarnScalingParams(4.0, 32.0, 0.0, 512, True)
    with pytest.raises(TypeError, match="scaling_params must be LinearScalingParams, got None"):
        LinearRotaryEmbedding(64, 4, 1e4, 100, device)
    with pytest.raises(TypeError, match="scaling_params must be YarnScalingParams, got None"):
        YarnRotaryEmbedding(64, 4, 1e4, 100, device)
    with pytest.raises(ValueError, match=r"theta must be above 1 for YaRN, got 1\.0"):
        YarnRotaryEmbedding(
            64, 4, 1.0, 9, device, scaling_params=YarnScalingParams(4.0, 32, 1, 512, True)
        )
