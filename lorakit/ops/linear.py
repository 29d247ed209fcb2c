"""The base product."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorakit import checks, jit, reference
from lorakit.dtypes import STORAGE, bfloat16


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias``: cuBLAS on a GPU, NumPy in float32 on the CPU. float32 never uses TF32.

    Args:
        x: ``[total_tokens, in_dim]``; rows may lie apart.
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
    checks.check_rows(x=x)
    if not _has_runs(weight) and not _has_runs(weight.T):
        raise ValueError(
            f"weight must be contiguous along a row or a column, got strides {tuple(weight.strides)}"
        )
    backend = jit.backend_of(x)
    if backend is None:
        return reference.linear(x, weight, bias)
    y = backend.empty((x.shape[0], weight.shape[0]), x.dtype)
    if y.size == 0:
        return y

    if bias is not None:
        with y.device:
            y[...] = bias
    _add_product(y, x, weight, keep=bias is not None)
    return y


def _add_product(y: Any, x: Any, weight: Any, *, keep: bool) -> None:
    """``y = x @ weight.T``, plus what `y` held with `keep`; summed in float32 and rounded once.

    cuBLAS is called by itself and not through `cupy.matmul`, which has no such sum, and which follows
    settings that round float32 inputs to TF32.
    """
    jit.import_cupy()
    from cupy.cuda import cublas, device, runtime

    types = {
        np.dtype(np.float32): runtime.CUDA_R_32F,
        np.dtype(np.float16): runtime.CUDA_R_16F,
        bfloat16: runtime.CUDA_R_16BF,
    }
    kind = types[np.dtype(x.dtype)]
    rows, in_dim, out_dim = x.shape[0], x.shape[1], weight.shape[0]
    one, old = np.array(1.0, np.float32), np.array(float(keep), np.float32)
    # cuBLAS counts along columns, so it sees every matrix transposed: y.T = weight @ x.T.
    along_rows = _has_runs(weight)
    with y.device:
        cublas.gemmEx(
            device.get_cublas_handle(),
            cublas.CUBLAS_OP_T if along_rows else cublas.CUBLAS_OP_N,
            cublas.CUBLAS_OP_N,
            out_dim,
            rows,
            in_dim,
            one.ctypes.data,
            weight.data.ptr,
            kind,
            _apart(weight if along_rows else weight.T),
            x.data.ptr,
            kind,
            _apart(x),
            old.ctypes.data,
            y.data.ptr,
            kind,
            out_dim,
            cublas.CUBLAS_COMPUTE_32F,
            cublas.CUBLAS_GEMM_DEFAULT,
        )


def _has_runs(matrix: Any) -> bool:
    """Elements of a row are neighbours, and rows do not overlap."""
    step, run = matrix.strides[0], matrix.shape[1] * matrix.dtype.itemsize
    neighbours = matrix.shape[1] <= 1 or matrix.strides[1] == matrix.dtype.itemsize
    return bool(neighbours and (matrix.shape[0] <= 1 or step >= run))


def _apart(matrix: Any) -> int:
    """Elements from one row to the next."""
    return int(max(matrix.strides[0] // matrix.dtype.itemsize, matrix.shape[1], 1))
