"""The storage dtypes of lorakit and what is known about their spacing."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

float32: np.dtype[Any] = np.dtype(np.float32)
float16: np.dtype[Any] = np.dtype(np.float16)
bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)

STORAGE: tuple[np.dtype[Any], ...] = (float32, float16, bfloat16)
"""What activations, weights, adapters and caches may be stored in."""


def ulp(value: ArrayLike, dtype: DTypeLike) -> NDArray[np.float64]:
    """The unit in the last place of ``dtype`` at ``value``: the gap between neighbours there.

    Rounding ``value`` to ``dtype`` moves it by at most half of this. Below the smallest normal
    number the gap stays that of the subnormal numbers; above the largest finite one it grows on
    as if the exponent had no end.

    Args:
        value: any shape, any real dtype.
        dtype: a floating dtype, ``bfloat16`` included.

    Returns:
        float64, the shape of ``value``; nan where ``value`` is not finite.
    """
    info: Any = ml_dtypes.finfo(np.dtype(dtype))  # type: ignore[no-untyped-call]
    value64 = np.asarray(value).astype(np.float64)
    # |value| is in [2**exponent, 2**(exponent + 1)); frexp gives 0 the exponent of 0.5.
    exponent = np.where(value64 == 0.0, info.minexp, np.frexp(value64)[1] - 1)
    gap = np.ldexp(1.0, np.maximum(exponent, info.minexp) - info.nmant)
    return np.where(np.isfinite(value64), gap, np.nan)
