"""The table of rotary angles. Variants for long contexts are in `rotary_scaling`."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit import checks
from lorakit.dtypes import STORAGE
from lorakit.nn.arrays import (
    Array,
    as_array,
    current_device_of,
    integer,
    module_of,
    positive,
    upload,
)
from lorakit.nn.device import DeviceRef


class RotaryEmbedding:
    """Angles ``position * theta ** (-2 i / head_dim)`` as a table of (cos, sin) pairs.

    Checkpoints from Hugging Face need ``interleaved=False``: pair ``i`` of a head is then elements
    ``(i, i + rotary_dim / 2)`` in place of ``(2 i, 2 i + 1)``. The table is the same for both.

    Args:
        dim: Hidden size; only used for ``head_dim``.
        n_heads: Query heads; likewise.
        theta: Base of the angles.
        max_seq_len: Longest sequence; the table has ``2 * max_seq_len`` rows.
        device: Where the table lives.
        head_dim: Elements of a head that are rotated (rotary_dim); None means ``dim // n_heads``.
            A value below the model's head dim rotates a part of each head.
        _freqs_cis: A ready float32 table, ``[positions, rotary_dim]`` or
            ``[positions, rotary_dim / 2, 2]``, used as it is.
        interleaved: Which elements form a pair.
        rotate_last: When only a part of each head is rotated: its last elements (MAX) instead of
            its first (Hugging Face).

    Raises:
        ValueError, TypeError: A size below 1, an odd head_dim, a theta that is not positive.
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
        *,
        rotate_last: bool = False,
    ) -> None:
        self.dim, self.n_heads, self.max_seq_len = positive(
            dim=dim, n_heads=n_heads, max_seq_len=max_seq_len
        )
        (self.head_dim,) = positive(
            head_dim=self.dim // self.n_heads if head_dim is None else head_dim
        )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if not (math.isfinite(checks.check_number(theta, "theta")) and theta > 0):
            raise ValueError(f"theta must be positive, got {theta}")
        if not isinstance(device, DeviceRef):
            raise TypeError(f"device must be a lorakit.DeviceRef, got {device!r}")
        self.theta = theta
        self.device = device
        self.interleaved = interleaved
        self.rotate_last = rotate_last
        self._given = None if _freqs_cis is None else self._given_table(_freqs_cis)

    @functools.cached_property
    def freqs_cis(self) -> Array:
        """``[positions, rotary_dim]`` float32 on the device: cos and sin of pair 0, of pair 1, ...

        The angles are computed in float64.
        """
        if self._given is not None:
            return self._given
        angles = np.outer(np.arange(self._rows(), dtype=np.float64), self._inv_freqs())
        table = np.empty((*angles.shape, 2), np.float32)
        table[..., 0] = np.cos(angles) * self._magnitude()
        table[..., 1] = np.sin(angles) * self._magnitude()
        return upload(table.reshape(len(table), self.head_dim), self.device)

    def freqs_cis_base(self) -> Array:
        """The table as ``[positions, rotary_dim / 2, 2]``, a view of `freqs_cis`."""
        return self.freqs_cis.reshape(self.freqs_cis.shape[0], self.head_dim // 2, 2)

    def compute_scale(self, user_scale: float | None = None) -> float:
        """What multiplies attention scores: `user_scale`, or ``head_dim ** -0.5`` for None."""
        return self.head_dim**-0.5 if user_scale is None else user_scale

    def __call__(self, x: Array, start_pos: int = 0, seq_len: int | None = None) -> Array:
        """Rotate heads that are in no cache: token ``t`` by row ``start_pos + t`` of the table.

        Args:
            x: ``[batch, seq_len, heads, head_dim]``, float32, float16 or bfloat16.
            start_pos: Position of the first token.
            seq_len: Tokens in `x`; None: ``x.shape[1]``.

        Returns:
            A new array like `x`, computed in float32 and rounded once; elements of a head beyond
            rotary_dim are copied.

        Raises:
            ValueError, TypeError: `x` does not fit, or a position is outside the table.
        """
        x = as_array(x, self.device, "x")
        checks.check_dtype(STORAGE, x=x)
        tokens = checks.check_shapes(x=(x, "batch seq_len heads head_dim"))["seq_len"]
        if seq_len is not None and seq_len != tokens:
            raise ValueError(f"seq_len must be {tokens}, the tokens in x, got {seq_len}")
        if x.shape[-1] < self.head_dim:
            raise ValueError(
                f"x must have heads of at least {self.head_dim} elements, got {x.shape[-1]}"
            )
        start, positions = integer(start_pos, "start_pos"), self.freqs_cis.shape[0]
        if start < 0 or start + tokens > positions:
            raise ValueError(
                f"start_pos must keep {tokens} tokens within {positions} positions, got {start}"
            )
        with current_device_of(x):
            return self._rotated(x, self.freqs_cis_base()[start : start + tokens, None])

    def _rotated(self, x: Array, pairs: Array) -> Array:
        xp = module_of(x)
        first = x.shape[-1] - self.head_dim if self.rotate_last else 0
        part = x[..., first : first + self.head_dim].astype(np.float32)
        half = self.head_dim // 2
        # Axes of `split`: ..., pair, (real, imaginary).
        split = part.reshape(*part.shape[:-1], *((half, 2) if self.interleaved else (2, half)))
        if not self.interleaved:
            split = xp.swapaxes(split, -1, -2)
        re, im = split[..., 0], split[..., 1]
        cos, sin = pairs[..., 0], pairs[..., 1]
        rotated = xp.stack([re * cos - im * sin, re * sin + im * cos], axis=-1)
        if not self.interleaved:
            rotated = xp.swapaxes(rotated, -1, -2)
        y = x.copy()
        y[..., first : first + self.head_dim] = rotated.reshape(part.shape).astype(x.dtype)
        return y

    def _inv_freqs(self) -> NDArray[np.float64]:
        """``[rotary_dim / 2]``: angle of each pair at position 1."""
        return self.theta ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)

    def _rows(self) -> int:
        return 2 * self.max_seq_len

    def _magnitude(self) -> float:
        """Multiplies cos and sin."""
        return 1.0

    def _given_table(self, table: Array) -> Array:
        table = as_array(table, self.device, "_freqs_cis", np.dtype(np.float32))
        if table.ndim == 3:
            checks.check_shapes(_freqs_cis=(table, f"positions {self.head_dim // 2} 2"))
        else:
            checks.check_shapes(_freqs_cis=(table, f"positions {self.head_dim}"))
        checks.check_contiguous(_freqs_cis=table)
        return table.reshape(table.shape[0], self.head_dim)


class DynamicRotaryEmbedding(RotaryEmbedding):
    """Refused: dynamic NTK changes the angles of a growing sequence, cached keys keep theirs.

    MAX's class of this name only grows the table, which ``max_seq_len`` does here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "DynamicRotaryEmbedding: dynamic NTK changes the angles of cached keys; "
            "use YarnRotaryEmbedding, or RotaryEmbedding with a larger max_seq_len or theta"
        )
