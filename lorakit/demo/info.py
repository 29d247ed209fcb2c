"""What lorakit runs on: versions, device, and the table of kernel instances."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

import lorakit
from lorakit import jit, tiles
from lorakit.nn import DeviceRef


def environment(device: DeviceRef) -> dict[str, str]:
    """Versions of what takes part on `device`, by name."""
    found = {
        "lorakit": lorakit.__version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
    }
    if device.is_cpu():
        return {"device": "CPU, NumPy references", **found}
    cuda = jit.import_cupy().cuda
    name = cuda.runtime.getDeviceProperties(device.id)["name"].decode()
    return {"device": f"{device} {name}", **found, **cuda_versions()}


def cuda_versions() -> dict[str, str]:
    """Versions of CuPy, NVRTC and the driver; of what is missing, that it is."""
    if importlib.util.find_spec("cupy") is None:
        return {"CuPy": "not installed"}
    cupy = jit.import_cupy()
    nvrtc, runtime = cupy.cuda.nvrtc, cupy.cuda.runtime
    return {
        "CuPy": cupy.__version__,
        "NVRTC": _or_none(lambda: ".".join(map(str, nvrtc.getVersion()))),
        "driver": driver_version(),
        "CUDA of the driver": _or_none(lambda: _cuda_version(runtime.driverGetVersion())),
    }


def driver_version() -> str:
    """Version of the NVIDIA driver that is loaded, or ``none``."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none"
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return match.group() if match else "unknown"


def print_info(device: DeviceRef) -> int:
    """Print versions, the device and every kernel instance; returns 0."""
    for name, value in {**environment(device), **cuda_versions()}.items():
        print(f"{name:<20} {value}")
    print(f"{'CUDA sources':<20} {jit.sources()}, digest {jit.source_digest()[:12]}")

    instances = tiles.instances()
    print(f"\n{len(instances)} kernel instances, compiled at first use")
    print(f"{'source':<14} {'instance':<70} {'threads':>7} {'shared bytes':>12}")
    for instance in instances:
        print(
            f"{instance.source:<14} {instance.name:<70} {instance.threads:>7} "
            f"{instance.shared_bytes:>12}"
        )
    return 0


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _or_none(version: Callable[[], str]) -> str:
    """A version, or why it cannot be told: the library or the driver may be missing."""
    try:
        return version()
    except Exception as error:
        return f"none ({type(error).__name__})"
