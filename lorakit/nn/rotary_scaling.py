"""Rotary embeddings for contexts longer than a model was first trained with.

Where MAX's numbers and those of Hugging Face transformers differ, these are transformers', since
real checkpoints expect them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorakit import checks
from lorakit.nn.arrays import Array
from lorakit.nn.device import DeviceRef
from lorakit.nn.rotary_embedding import RotaryEmbedding

_Params = TypeVar("_Params")


@dataclass(frozen=True)
class LinearScalingParams:
    """Every angle is divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor)


class LinearRotaryEmbedding(RotaryEmbedding):
    """Positions compressed by a constant factor (Hugging Face rope type ``linear``; not in MAX).

    Args:
        scaling_params: `LinearScalingParams`, required. Other arguments: see `RotaryEmbedding`.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        theta: float,
        max_seq_len: int,
        device: DeviceRef,
        head_dim: int | None = None,
        _freqs_cis: Array | None = None,
        interleaved: bool = True,
        scaling_params: LinearScalingParams | None = None,
        *,
        rotate_last: bool = False,
    ) -> None:
        self.scaling_params = _required(scaling_params, LinearScalingParams)
        super().__init__(
            dim,
            n_heads,
            theta,
            max_seq_len,
            device,
            head_dim,
            _freqs_cis,
            interleaved,
            rotate_last=rotate_last,
        )

    def _inv_freqs(self) -> NDArray[np.float64]:
        return super()._inv_freqs() / self.scaling_params.factor


@dataclass(frozen=True)
class Llama3RopeScalingParams:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept.

    Attributes:
        factor: Divides the angles of long wavelengths.
        low_freq_factor: A wavelength above ``orig_max_position / low_freq_factor`` is long.
        high_freq_factor: A wavelength below ``orig_max_position / high_freq_factor`` is short.
        orig_max_position: Context length the model was first trained with.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    orig_max_position: int

    def __post_init__(self) -> None:
        _check_positive(
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            orig_max_position=self.orig_max_position,
        )
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be at least low_freq_factor = {self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )


class Llama3RotaryEmbedding(RotaryEmbedding):
    """Llama 3.1's rotary embedding (Hugging Face rope type ``llama3``).

    Args:
        scaling_params: `Llama3RopeScalingParams`; None: no scaling. Other arguments: see
            `RotaryEmbedding`.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        theta: float,
        max_seq_len: int,
        device: DeviceRef,
        head_dim: int | None = None,
        _freqs_cis: Array | None = None,
        interleaved: bool = True,
        scaling_params: Llama3RopeScalingParams | None = None,
        *,
        rotate_last: bool = False,
    ) -> None:
        if scaling_params is not None:
            _required(scaling_params, Llama3RopeScalingParams)
        self.scaling_params = scaling_params
        super().__init__(
            dim,
            n_heads,
            theta,
            max_seq_len,
            device,
            head_dim,
            _freqs_cis,
            interleaved,
            rotate_last=rotate_last,
        )

    def _inv_freqs(self) -> NDArray[np.float64]:
        freqs, params = super()._inv_freqs(), self.scaling_params
        if params is None:
            return freqs
        low, high = params.low_freq_factor, params.high_freq_factor
        turns = params.orig_max_position * freqs / (2 * math.pi)  # context over wavelength
        # 0 for long wavelengths, 1 for short ones, a ramp between.
        kept = np.clip((turns - low) / (high - low), 0, 1) if low < high else turns > high
        return freqs * (kept + (1 - kept) / params.factor)


@dataclass(frozen=True)
class YarnScalingParams:
    """YaRN's scaling: slow pairs are divided by `factor`, fast ones kept, a ramp between.

    Attributes:
        factor: Divides the angles of slow pairs.
        beta_fast: Turns within the original context above which a pair is fast.
        beta_slow: Turns within the original context below which a pair is slow.
        original_max_position_embeddings: Context length the model was first trained with.
        truncate: Round the ends of the ramp to whole pairs (ignored by MAX; transformers honours
            it).
        attention_factor: Multiplies cos and sin; None: computed from `factor` and the mscales.
        mscale, mscale_all_dim: When both are set and not 0, `attention_factor` is the ratio of the
            magnitudes they give.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    truncate: bool
    attention_factor: float | None = field(default=None, kw_only=True)
    mscale: float | None = field(default=None, kw_only=True)
    mscale_all_dim: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_positive(
            factor=self.factor,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            original_max_position_embeddings=self.original_max_position_embeddings,
        )


class YarnRotaryEmbedding(RotaryEmbedding):
    """YaRN (Hugging Face rope type ``yarn``, whose numbers win over MAX's where they differ).

    The attention factor is part of cos and sin, so that `compute_scale` stays plain. As in MAX the
    table has ``max_seq_len`` rows, since that is the extended length.

    Args:
        scaling_params: `YarnScalingParams`, required. Other arguments: see `RotaryEmbedding`.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        theta: float,
        max_seq_len: int,
        device: DeviceRef,
        head_dim: int | None = None,
        _freqs_cis: Array | None = None,
        interleaved: bool = True,
        scaling_params: YarnScalingParams | None = None,
        *,
        rotate_last: bool = False,
    ) -> None:
        self.scaling_params = _required(scaling_params, YarnScalingParams)
        super().__init__(
            dim,
            n_heads,
            theta,
            max_seq_len,
            device,
            head_dim,
            _freqs_cis,
            interleaved,
            rotate_last=rotate_last,
        )
        if self.theta <= 1:
            raise ValueError(f"theta must be above 1 for YaRN, got {self.theta}")

    def _inv_freqs(self) -> NDArray[np.float64]:
        freqs, params = super()._inv_freqs(), self.scaling_params
        low, high = self._pair_turning(params.beta_fast), self._pair_turning(params.beta_slow)
        if params.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001  # a step; transformers' number
        ramp = (np.arange(self.head_dim // 2, dtype=np.float64) - low) / (high - low)
        slow: NDArray[np.float64] = np.clip(ramp, 0, 1)
        return freqs * (1 - slow) + freqs / params.factor * slow

    def _pair_turning(self, turns: float) -> float:
        """Index of the pair that makes this many turns within the original context."""
        wavelength = self.scaling_params.original_max_position_embeddings / turns
        return self.head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(self.theta))

    def _rows(self) -> int:
        return self.max_seq_len

    def _magnitude(self) -> float:
        params = self.scaling_params
        if params.attention_factor is not None:
            return params.attention_factor
        if params.mscale and params.mscale_all_dim:
            above = _yarn_magnitude(params.factor, params.mscale)
            return above / _yarn_magnitude(params.factor, params.mscale_all_dim)
        return _yarn_magnitude(params.factor, 1.0)


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _required(params: Any, kind: type[_Params]) -> _Params:
    if not isinstance(params, kind):
        raise TypeError(f"scaling_params must be {kind.__name__}, got {params!r}")
    return params


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(checks.check_number(value, name)) and value > 0):
            raise ValueError(f"{name} must be positive, got {value}")
