"""Bringing what a user passes to the place where a layer lives, without a copy or not at all."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lorakit import checks, jit
from lorakit.dtypes import STORAGE
from lorakit.nn.device import DeviceRef
from lorakit.nn.dtype import DType

# A NumPy array on the CPU, a CuPy array on a GPU; CuPy must not be imported to say so.
Array: TypeAlias = Any

# A number that the host knows: an int, a NumPy integer, or a NumPy array that holds one.
HostInteger: TypeAlias = "int | np.integer[Any] | NDArray[np.integer[Any]]"

# Device kinds of DLPack.
_DLPACK_HOST = (1, 3)  # memory of the CPU; pinned memory
_DLPACK_CUDA = (2,)


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any], device: DeviceRef) -> Array:
    """An array of zeros on `device`."""
    if device.is_cpu():
        return np.zeros(shape, dtype)
    return jit.cupy_backend(device.id).zeros(shape, dtype)


def upload(array: np.ndarray[Any, Any], device: DeviceRef) -> Array:
    """A host array as an array on `device`: itself on the CPU, a copy on a GPU."""
    return array if device.is_cpu() else jit.cupy_backend(device.id).asarray(array)


def module_of(array: Array) -> Any:
    """The array library of an array: NumPy or CuPy."""
    return np if isinstance(array, np.ndarray) else jit.import_cupy()


def as_array(value: Any, device: DeviceRef, name: str, dtype: np.dtype[Any] | None = None) -> Array:
    """`value` as NumPy array (CPU) or CuPy array (GPU) over the same memory.

    Args:
        value: An array on `device`: NumPy or CuPy, or anything else with ``__dlpack__`` or
            ``__cuda_array_interface__``.
        device: Where it must be.
        name: Name of the argument, for messages.
        dtype: When given, the dtype it must have.

    Raises:
        TypeError: No array, on another device, or of another dtype.
    """
    array = _host_array(value) if device.is_cpu() else _cuda_array(value, device.id)
    if array is None:
        raise TypeError(f"{name} must be an array on {device}, got {_describe(value)}")
    if dtype is not None:
        checks.check_dtype((dtype,), **{name: array})
    return array


def as_any_array(value: Any, name: str) -> Array:
    """`value` as NumPy or CuPy array over the same memory, wherever it lives, else `TypeError`."""
    array = _host_array(value)
    if array is None:
        array = _cuda_array(value, None)
    if array is None:
        raise TypeError(f"{name} must be an array, got {_describe(value)}")
    return array


def as_metadata(
    value: Any, device: DeviceRef, name: str, dtypes: Iterable[Any]
) -> tuple[Array, np.ndarray[Any, Any] | None]:
    """Integer metadata of a batch, from the host or from `device`.

    A host array is copied once, so that later changes by its owner do not undo the checks made on
    it. A device array is kept by reference, so that it can be rewritten in place under a CUDA
    graph.

    Returns:
        The array on `device`, and the host's copy of it or None.

    Raises:
        TypeError: No array, an array elsewhere, or none of `dtypes`.
    """
    given = _host_array(value)
    if given is not None and jit.is_host(given):
        checks.check_dtype(dtypes, **{name: given})
        host: np.ndarray[Any, Any] = given.copy()
        return upload(host, device), host
    array = as_array(value, device, name)
    checks.check_dtype(dtypes, **{name: array})
    return array, None


def copy_into(target: Array, source: Array) -> None:
    """``target[...] = source``, from any device to any, with equal shapes and dtypes."""
    with current_device_of(target):
        if isinstance(target, np.ndarray):
            target[...] = source if isinstance(source, np.ndarray) else source.get()
        else:
            target[...] = jit.import_cupy().asarray(source)


def fill(target: Array, value: int) -> None:
    """``target[...] = value``, on the array's device."""
    with current_device_of(target):
        target[...] = value


def rounded(array: Array, dtype: np.dtype[Any], scaling: float = 1.0) -> Array:
    """``scaling * array`` computed in float32 and rounded once to `dtype`: always a new array."""
    with current_device_of(array):
        return (array.astype(np.float32) * np.float32(scaling)).astype(dtype)


def current_device_of(array: Array) -> contextlib.AbstractContextManager[Any]:
    """Makes an array's GPU the current one, as CuPy's elementwise functions need."""
    return contextlib.nullcontext() if isinstance(array, np.ndarray) else array.device


def storage_dtype(dtype: Any, name: str = "dtype") -> np.dtype[Any]:
    """The NumPy dtype of a storage `DType`: float32, float16 or bfloat16.

    Raises:
        TypeError: Not a `DType`.
        ValueError: Another `DType`.
    """
    if not isinstance(dtype, DType):
        raise TypeError(f"{name} must be a lorakit.DType, got {dtype!r}")
    if dtype not in (DType.float32, DType.float16, DType.bfloat16):
        names = ", ".join(str(d) for d in STORAGE)
        raise ValueError(f"{name} must be one of {names}, got {dtype.value}")
    return dtype.to_numpy()


def positive(**sizes: Any) -> tuple[int, ...]:
    """Each argument as an int of at least 1, else `TypeError` or `ValueError`."""
    result = []
    for name, size in sizes.items():
        whole = integer(size, name)
        if whole < 1:
            raise ValueError(f"{name} must be at least 1, got {whole}")
        result.append(whole)
    return tuple(result)


def integer(value: Any, name: str) -> int:
    """A host integer: an int, a NumPy integer, or a NumPy array that holds one.

    Raises:
        TypeError: Anything else; a device array too, as reading it would wait for the device.
    """
    if jit.is_host(value) and value.size == 1 and value.dtype.kind in "iu":
        return int(value.reshape(-1)[0])
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer on the host, got {_describe(value)}")
    return operator.index(value)


def _host_array(value: Any) -> Array | None:
    if isinstance(value, np.ndarray):
        return value
    if _dlpack_device(value)[0] in _DLPACK_HOST:
        # A type that NumPy's DLPack does not know (bfloat16) is no array on the CPU for us.
        with contextlib.suppress(BufferError, RuntimeError):
            return np.from_dlpack(value)
    return None


def _cuda_array(value: Any, device_id: int | None) -> Array | None:
    """`value` as CuPy array, if it is on this GPU (None: on any)."""
    if isinstance(value, np.ndarray):
        return None
    if _is_cupy(value):
        array = value
    elif _dlpack_device(value)[0] in _DLPACK_CUDA:
        try:
            array = jit.import_cupy().from_dlpack(value)
        except (BufferError, NotImplementedError):  # a type that CuPy's DLPack does not know
            return None
    elif hasattr(value, "__cuda_array_interface__"):
        array = jit.import_cupy().asarray(value)  # views the memory of such a producer
    else:
        return None
    return array if device_id in (None, array.device.id) else None


def _is_cupy(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "cupy" and hasattr(value, "device")


def _dlpack_device(value: Any) -> tuple[int | None, int | None]:
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        kind, number = value.__dlpack_device__()
        return int(kind), int(number)
    return None, None


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a NumPy array {tuple(value.shape)} of {value.dtype}"
    if _is_cupy(value):
        return f"a CuPy array {tuple(value.shape)} on gpu:{value.device.id}"
    return f"{type(value).__module__}.{type(value).__qualname__}"
