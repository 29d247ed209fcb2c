"""The plain dense layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lorakit import checks, ops
from lorakit.nn.arrays import (
    Array,
    as_array,
    current_device_of,
    module_of,
    positive,
    storage_dtype,
    zeros,
)
from lorakit.nn.device import DeviceRef
from lorakit.nn.dtype import DType
from lorakit.nn.module import Module, NamedWeight


class Linear(Module):
    """``y = x @ weight.T + bias`` (MAX `max.nn.Linear`). Weights start as zeros.

    Args:
        in_dim: Features of the input.
        out_dim: Features of the output.
        dtype: float32, float16 or bfloat16, of weights and activations alike.
        device: Where the weights live and where inputs must be.
        has_bias: Adds ``bias``, ``[out_dim]``.
        quantization_encoding: Not implemented.
        float8_config: Not implemented.
        name: Prefix of the weights' names.
        clip_weight: Clamps the weight to ``[-clip_weight, clip_weight]`` in every product; the
            stored weight and the bias stay as they are.

    Attributes:
        weight: ``[out_dim, in_dim]``, named ``weight`` or ``{name}.weight``.
        bias: ``[out_dim]`` or None, named ``bias`` or ``{name}.bias``.

    Raises:
        ValueError, TypeError: A size below 1, another dtype, no `DeviceRef`, a negative clip.
        NotImplementedError: `quantization_encoding` or `float8_config` is given.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dtype: DType,
        device: DeviceRef,
        has_bias: bool = False,
        quantization_encoding: Any = None,
        float8_config: Any = None,
        name: str | None = None,
        clip_weight: float | None = None,
    ) -> None:
        refuse(quantization_encoding=quantization_encoding, float8_config=float8_config)
        self.in_dim, self.out_dim = positive(in_dim=in_dim, out_dim=out_dim)
        array_dtype = storage_dtype(dtype)
        if not isinstance(device, DeviceRef):
            raise TypeError(f"device must be a lorakit.DeviceRef, got {device!r}")
        self.dtype = dtype
        self.device = device
        self.clip_weight = check_clip(clip_weight, "clip_weight")
        self._prefix = f"{name}." if name else ""
        self.weight = zeros((self.out_dim, self.in_dim), array_dtype, device)
        self.bias: Array | None = zeros((self.out_dim,), array_dtype, device) if has_bias else None

    def own_weights(self) -> Iterator[NamedWeight]:
        yield NamedWeight(f"{self._prefix}weight", self.weight)
        if self.bias is not None:
            yield NamedWeight(f"{self._prefix}bias", self.bias)

    def __call__(self, x: Array) -> Array:
        """``x @ weight.T + bias``.

        Args:
            x: ``[..., in_dim]``, C-contiguous, of the layer's dtype and on its device.

        Returns:
            ``[..., out_dim]``, a new array of the layer's dtype.

        Raises:
            ValueError, TypeError: `x` is not such an array.
        """
        rows, leading = self._rows(x)
        return self._base(rows).reshape(*leading, self.out_dim)

    def _rows(self, x: Array) -> tuple[Array, tuple[int, ...]]:
        """`x` as ``[rows, in_dim]`` over the same memory, and its leading axes."""
        x = as_array(x, self.device, "x", self.dtype.to_numpy())
        if x.ndim == 0 or x.shape[-1] != self.in_dim:
            raise ValueError(f"x must have shape [..., in_dim = {self.in_dim}], got {x.shape}")
        checks.check_vectors(x=x)  # a reshape would copy any other silently
        return x.reshape(math.prod(x.shape[:-1]), self.in_dim), x.shape[:-1]

    @property
    def effective_weight(self) -> Array:
        """What multiplies `x`: ``weight`` itself, or a clamped copy with `clip_weight`."""
        return clipped(self.weight, self.clip_weight)

    def _base(self, rows: Array) -> Array:
        return ops.linear(rows, self.effective_weight, self.bias)


def check_clip(clip: float | None, name: str) -> float | None:
    """A bound for clamping; 0.0 is a value, None means unset."""
    if clip is not None and not checks.check_number(clip, name) >= 0:
        raise ValueError(f"{name} must be None or at least 0, got {clip}")
    return clip


def clipped(weight: Array, clip: float | None) -> Array:
    """`weight` clamped to ``[-clip, clip]``: a new array, or `weight` itself when clip is None."""
    if clip is None:
        return weight
    xp = module_of(weight)
    with current_device_of(weight):
        # Not xp.clip, which does not know bfloat16. A bfloat16 weight may come back wider; rounding
        # keeps the order, so the clamped value is the rounded bound or the weight itself.
        bounded = xp.minimum(xp.maximum(weight, -float(clip)), float(clip))
        return bounded.astype(weight.dtype, copy=False)


def refuse(**arguments: Any) -> None:
    """`NotImplementedError` naming the first argument that is not None."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not implemented, got {value!r}")
