"""Arrays to the device under test and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lorakit import DeviceRef, jit


@pytest.fixture
def to_device(device: DeviceRef) -> Callable[[np.ndarray[Any, Any]], Any]:
    """A NumPy array as an array on the device."""

    def convert(array: np.ndarray[Any, Any]) -> Any:
        if device.is_cpu():
            return array
        cupy = jit.import_cupy()
        with cupy.cuda.Device(device.id):
            return cupy.asarray(array)

    return convert


@pytest.fixture
def to_host() -> Callable[[Any], np.ndarray[Any, Any]]:
    """An array of any device as NumPy array."""
    return lambda array: array if isinstance(array, np.ndarray) else array.get()
