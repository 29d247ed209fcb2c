"""The one product that lorakit asks of cuBLAS, callable while a CUDA graph is captured.

CuPy's own functions refuse a capture, so the library that CuPy has loaded is called here itself.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from lorakit import jit
from lorakit.dtypes import bfloat16

# Of cublas_api.h and library_types.h.
_NO_TRANSPOSE, _TRANSPOSE = 0, 1
_KINDS = {np.dtype(np.float32): 0, np.dtype(np.float16): 2, bfloat16: 14}  # CUDA_R_32F, 16F, 16BF
_COMPUTE_32F = 68
_GEMM_DEFAULT = -1
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16  # alone, so neither TF32 nor sums in 16 bits

_WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for Hopper and later, the largest of all GPUs


def add_product(y: Any, x: Any, weight: Any, *, keep: bool) -> None:
    """``y = x @ weight.T``, plus what `y` held with `keep`; summed in float32 and rounded once.

    The workspace comes from CuPy's allocator of the moment, as `y` does: within a capture it belongs to the
    graph, and replays on several streams do not share it.
    """
    library, handle = _library(), _handle()
    cupy = jit.import_cupy()
    stream = cupy.cuda.get_current_stream().ptr
    workspace = cupy.empty(_WORKSPACE_BYTES, np.uint8)
    one, old = ctypes.c_float(1.0), ctypes.c_float(float(keep))
    kind = _KINDS[np.dtype(x.dtype)]
    along_rows = has_runs(weight)
    mode = ctypes.c_int()
    _check(library.cublasGetMathMode(handle, ctypes.byref(mode)))
    try:
        _check(library.cublasSetMathMode(handle, _DISALLOW_REDUCED_PRECISION_REDUCTION))
        _check(library.cublasSetStream_v2(handle, ctypes.c_void_p(stream)))
        _check(
            library.cublasSetWorkspace_v2(
                handle, ctypes.c_void_p(workspace.data.ptr), ctypes.c_size_t(_WORKSPACE_BYTES)
            )
        )
        # cuBLAS counts along columns, so it sees every matrix transposed: y.T = weight @ x.T.
        _check(
            library.cublasGemmEx_64(
                handle,
                _TRANSPOSE if along_rows else _NO_TRANSPOSE,
                _NO_TRANSPOSE,
                *map(ctypes.c_int64, (weight.shape[0], x.shape[0], x.shape[1])),
                ctypes.byref(one),
                *_matrix(weight if along_rows else weight.T, kind),
                *_matrix(x, kind),
                ctypes.byref(old),
                *_matrix(y, kind),
                _COMPUTE_32F,
                _GEMM_DEFAULT,
            )
        )
    finally:
        library.cublasSetMathMode(handle, mode)
        library.cublasSetStream_v2(handle, ctypes.c_void_p(stream))  # forgets the workspace


def has_runs(matrix: Any) -> bool:
    """Elements of a row are neighbours, and rows do not overlap."""
    step, run = matrix.strides[0], matrix.shape[1] * matrix.dtype.itemsize
    neighbours = matrix.shape[1] <= 1 or matrix.strides[1] == matrix.dtype.itemsize
    return bool(neighbours and (matrix.shape[0] <= 1 or step >= run))


def _matrix(matrix: Any, kind: int) -> tuple[ctypes.c_void_p, int, ctypes.c_int64]:
    """Address, type, and elements from one row to the next."""
    apart = max(matrix.strides[0] // matrix.dtype.itemsize, matrix.shape[1], 1)
    return ctypes.c_void_p(matrix.data.ptr), kind, ctypes.c_int64(apart)


def _handle() -> ctypes.c_void_p:
    """CuPy's handle of this thread and the current device."""
    from cupy.cuda import device

    return ctypes.c_void_p(device.get_cublas_handle())


@functools.cache
def _library() -> ctypes.CDLL:
    """The library that CuPy has loaded, found by its name."""
    from cupy.cuda import cublas, device

    return ctypes.CDLL(f"libcublas.so.{cublas.getVersion(device.get_cublas_handle()) // 10000}")


def _check(status: int) -> None:
    """
    Raises:
        RuntimeError: cuBLAS refused a call.
    """
    if status:
        _library().cublasGetStatusString.restype = ctypes.c_char_p
        raise RuntimeError(f"cuBLAS: {_library().cublasGetStatusString(status).decode()}")
