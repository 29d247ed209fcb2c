"""The one call of the CUDA driver that CuPy does not have: a launch with attributes."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lorakit.tiles import Instance

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_PARAM_BUFFER_POINTER, _PARAM_BUFFER_SIZE = 1, 2  # CU_LAUNCH_PARAM_*


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, its value an int in a union of 64 bytes."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


_EARLY = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)


def launch_early(
    function: int, instance: Instance, grid: Sequence[int], args: Sequence[Any], stream: int
) -> None:
    """cuLaunchKernelEx with programmatic stream serialization."""
    formats: list[str] = ["@"]
    values: list[Any] = []
    for arg in args:
        if arg is None:
            formats.append("Q")
            values.append(0)
        elif isinstance(arg, tuple):
            formats.append(f"{len(arg)}q")
            values += [0 if m is None else m if isinstance(m, int) else m.data.ptr for m in arg]
        elif isinstance(arg, bool):
            formats.append("?")
            values.append(arg)
        elif isinstance(arg, int):
            formats.append("i")
            values.append(arg)
        elif isinstance(arg, float):
            formats.append("f")
            values.append(arg)
        elif isinstance(arg, np.generic):
            formats.append(arg.dtype.char)
            values.append(arg.item())
        else:
            formats.append("Q")
            values.append(arg.data.ptr)
    buffer = struct.pack("".join(formats), *values)
    size = ctypes.c_size_t(len(buffer))
    extra = (ctypes.c_void_p * 5)(
        _PARAM_BUFFER_POINTER,
        ctypes.cast(ctypes.c_char_p(buffer), ctypes.c_void_p),
        _PARAM_BUFFER_SIZE,
        ctypes.addressof(size),
        None,
    )
    config = _Config(
        (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
        (ctypes.c_uint * 3)(instance.threads, 1, 1),
        instance.shared_bytes,
        stream,
        ctypes.pointer(_EARLY),
        1,
    )
    status = _library().cuLaunchKernelEx(
        ctypes.byref(config), ctypes.c_void_p(function), None, extra
    )
    if status:
        raise RuntimeError(f"cuLaunchKernelEx of {instance.name} failed with status {status}")
