"""Reference of the base product."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def linear(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None = None) -> NDArray[Any]:
    """``y = x @ weight.T (+ bias)``, summed in float32, since it runs whole layers on the CPU.

    Args:
        x: ``[..., in_dim]``.
        weight: ``[out_dim, in_dim]``.
        bias: ``[out_dim]`` or None.

    Returns:
        ``[..., out_dim]`` in ``x``'s dtype.
    """
    wide = np.promote_types(x.dtype, np.float32)
    y: NDArray[Any] = x.astype(wide, copy=False) @ weight.astype(wide, copy=False).T
    if bias is not None:
        y += bias
    return y.astype(x.dtype, copy=False)
