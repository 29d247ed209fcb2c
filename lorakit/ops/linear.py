"""The base product."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorakit import checks, jit, reference
from lorakit.dtypes import STORAGE


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias``: cuBLAS on a GPU, NumPy in float32 on the CPU. float32 never uses TF32.

    Args:
        x: ``[total_tokens, in_dim]``.
        weight: ``[out_dim, in_dim]`` in x's dtype.
        bias: ``[out_dim]`` in x's dtype, or None.

    Returns:
        ``[total_tokens, out_dim]`` in x's dtype.

    Raises:
        ValueError, TypeError: Naming the argument.
    """
    arrays = {"x": (x, "total_tokens in_dim"), "weight": (weight, "out_dim in_dim")}
    if bias is not None:
        arrays["bias"] = (bias, "out_dim")
    checks.check_shapes(**arrays)
    checks.check_dtype(STORAGE, x=x)
    checks.check_dtype((x.dtype,), **{name: array for name, (array, _) in arrays.items()})
    checks.check_same_place(**{name: array for name, (array, _) in arrays.items()})
    if jit.is_host(x):
        return reference.linear(x, weight, bias)

    y = _matmul(x, weight)
    if bias is not None:
        y += bias
    return y


def _matmul(x: Any, weight: Any) -> Any:
    cupy = jit.import_cupy()
    from cupy._core import _routines_linalg as settings

    before = settings.get_compute_type(x.dtype)
    if x.dtype != np.float32 or before != settings.COMPUTE_TYPE_TF32:
        return cupy.matmul(x, weight.T)
    # CUPY_TF32=1 would round the inputs to 10 bits.
    settings.set_compute_type(x.dtype, settings.COMPUTE_TYPE_FP32)
    try:
        return cupy.matmul(x, weight.T)
    finally:
        settings.set_compute_type(x.dtype, before)
