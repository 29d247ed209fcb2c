"""Where a layer's arrays live."""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.util
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit import jit


class DeviceKind(enum.Enum):
    """CPU or GPU (MAX `DeviceKind`)."""

    CPU = "cpu"
    GPU = "gpu"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class DeviceRef:
    """A device, by kind and number (MAX `max.graph.DeviceRef`). Equal and hashed by both.

    Layers on a CPU hold NumPy arrays and run the references; on a GPU they hold CuPy arrays and run
    the kernels. A DeviceRef is only a name: making one touches no GPU.

    Args:
        device_type: `DeviceKind`, or ``"cpu"`` or ``"gpu"``.
        id: Number of the device, from 0.

    Raises:
        ValueError: Unknown kind, or a negative id (MAX clamps it to 0).
        TypeError: `id` is no integer.
    """

    device_type: DeviceKind
    id: int = 0

    def __post_init__(self) -> None:
        try:
            kind = DeviceKind(self.device_type)
        except ValueError:
            raise ValueError(f"device_type must be cpu or gpu, got {self.device_type!r}") from None
        if isinstance(self.id, bool) or not hasattr(self.id, "__index__"):
            raise TypeError(f"id must be an integer, got {type(self.id).__name__}")
        if self.id < 0:
            raise ValueError(f"id must not be negative, got {self.id}")
        object.__setattr__(self, "device_type", kind)
        object.__setattr__(self, "id", operator.index(self.id))

    @staticmethod
    def CPU(id: int = 0) -> DeviceRef:
        """The CPU."""
        return DeviceRef(DeviceKind.CPU, id)

    @staticmethod
    def GPU(id: int = 0) -> DeviceRef:
        """A GPU, by its CUDA number."""
        return DeviceRef(DeviceKind.GPU, id)

    @staticmethod
    def current() -> DeviceRef:
        """The current GPU of CuPy when there is one, else the CPU: what ``devices=None`` means.

        CuPy is imported only where there is an NVIDIA driver.
        """
        if not _has_driver() or importlib.util.find_spec("cupy") is None:
            return DeviceRef.CPU()
        cupy = jit.import_cupy()
        try:
            if cupy.cuda.runtime.getDeviceCount() == 0:
                return DeviceRef.CPU()
            return DeviceRef.GPU(cupy.cuda.runtime.getDevice())
        except cupy.cuda.runtime.CUDARuntimeError:  # a driver without a usable GPU
            return DeviceRef.CPU()

    def is_cpu(self) -> bool:
        """True for a CPU."""
        return self.device_type is DeviceKind.CPU

    def is_gpu(self) -> bool:
        """True for a GPU."""
        return self.device_type is DeviceKind.GPU

    def to_device(self) -> Any:
        """What ``array.device`` says there: ``"cpu"`` (NumPy), or a `cupy.cuda.Device`."""
        return "cpu" if self.is_cpu() else jit.import_cupy().cuda.Device(self.id)

    @staticmethod
    def from_device(device: Any) -> DeviceRef:
        """The reference for ``array.device`` of a NumPy or CuPy array.

        Raises:
            TypeError: Neither ``"cpu"`` nor a `cupy.cuda.Device`.
        """
        if isinstance(device, str) and device == "cpu":
            return DeviceRef.CPU()
        if type(device).__module__.startswith("cupy"):
            return DeviceRef.GPU(device.id)
        raise TypeError(f"device must be 'cpu' or a cupy.cuda.Device, got {device!r}")

    def __str__(self) -> str:
        return f"{self.device_type}:{self.id}"


def single_device(devices: Sequence[DeviceRef] | None) -> DeviceRef:
    """The one device of a ``devices`` argument; None means the current one.

    Raises:
        TypeError: Not a sequence of `DeviceRef`.
        ValueError: Empty.
        NotImplementedError: More than one device.
    """
    if devices is None:
        return DeviceRef.current()
    if not isinstance(devices, Sequence) or not all(isinstance(d, DeviceRef) for d in devices):
        raise TypeError(f"devices must be a sequence of DeviceRef, got {devices!r}")
    if not devices:
        raise ValueError("devices must name a device, got an empty sequence")
    if len(devices) > 1:
        raise NotImplementedError(f"devices must name one device, got {len(devices)}")
    return devices[0]


@functools.cache
def _has_driver() -> bool:
    """True if the CUDA driver library can be loaded, which initialises nothing."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
