"""The base product."""

from __future__ import annotations

from typing import Any

from lorakit import checks, cublas, jit, reference
from lorakit.dtypes import STORAGE


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias``: cuBLAS on a GPU, NumPy in float32 on the CPU. float32 never uses TF32.

    Args:
        x: ``[total_tokens, in_dim]``; rows may lie apart, not overlap.
        weight: ``[out_dim, in_dim]`` in x's dtype, contiguous along rows or columns.
        bias: ``[out_dim]`` in x's dtype, or None.

    Returns:
        ``[total_tokens, out_dim]`` in x's dtype, rounded once.

    Raises:
        ValueError, TypeError: Naming the argument.
    """
    arrays = {"x": (x, "total_tokens in_dim"), "weight": (weight, "out_dim in_dim")}
    if bias is not None:
        arrays["bias"] = (bias, "out_dim")
    checks.check_shapes(**arrays)
    given = {name: array for name, (array, _) in arrays.items()}
    checks.check_dtype(STORAGE, x=x)
    checks.check_dtype((x.dtype,), **given)
    checks.check_same_place(**given)
    checks.check_rows_apart(x=x)
    if not cublas.has_runs(weight) and not cublas.has_runs(weight.T):
        raise ValueError(
            f"weight must be contiguous along a row or a column, got strides {tuple(weight.strides)}"
        )
    backend = jit.backend_of(x)
    if backend is None:
        return reference.linear(x, weight, bias)
    y = backend.empty((x.shape[0], weight.shape[0]), x.dtype)
    if y.size == 0:
        return y

    with y.device:
        if bias is not None:
            y[...] = bias
        cublas.add_product(y, x, weight, keep=bias is not None)
    return y
