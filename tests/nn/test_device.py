"""Device names, the default device, and what is taken as an array there."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lorakit import DeviceKind, DeviceRef, jit
from lorakit.nn import device as device_module
from lorakit.nn.arrays import as_array, as_metadata, integer
from lorakit.nn.device import single_device

CPU = DeviceRef.CPU()


def test_value_semantics() -> None:
    assert DeviceRef.GPU() == DeviceRef("gpu", 0) == DeviceRef(DeviceKind.GPU)  # type: ignore[arg-type]
    assert len({DeviceRef.GPU(), DeviceRef.GPU(0), DeviceRef.GPU(1), CPU}) == 3
    assert str(DeviceRef.GPU(2)) == "gpu:2"
    assert str(CPU) == "cpu:0"
    assert CPU.is_cpu()
    assert not CPU.is_gpu()
    assert DeviceRef.GPU().is_gpu()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("gpu", -1), ValueError, "id must not be negative, got -1"),
        (("tpu", 0), ValueError, "device_type must be cpu or gpu, got 'tpu'"),
        (("gpu", 1.0), TypeError, "id must be an integer, got float"),
        (("gpu", True), TypeError, "id must be an integer, got bool"),
    ],
)
def test_refusals(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        DeviceRef(*arguments)


def test_to_and_from_the_array_library() -> None:
    array = np.zeros(1)
    assert DeviceRef.from_device(array.device) == CPU
    assert CPU.to_device() == array.device
    with pytest.raises(TypeError, match="device must be"):
        DeviceRef.from_device("gpu")


def test_current_is_the_cpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it now fails
    device_module._has_driver.cache_clear()
    try:
        assert DeviceRef.current() == CPU
    finally:
        device_module._has_driver.cache_clear()


def test_current_is_cupys_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDARuntimeError(RuntimeError):
        pass

    runtime = SimpleNamespace(
        getDeviceCount=lambda: 4, getDevice=lambda: 3, CUDARuntimeError=CUDARuntimeError
    )
    monkeypatch.setattr(device_module, "_has_driver", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        jit,
        "import_cupy",
        lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)),
    )
    assert DeviceRef.current() == DeviceRef.GPU(3)
    runtime.getDeviceCount = lambda: 0
    assert DeviceRef.current() == CPU

    def broken() -> int:
        raise CUDARuntimeError("driver too old")

    runtime.getDeviceCount = broken
    assert DeviceRef.current() == CPU


def test_single_device() -> None:
    assert single_device([DeviceRef.GPU(1)]) == DeviceRef.GPU(1)
    assert single_device(None) == DeviceRef.current()
    with pytest.raises(NotImplementedError, match="devices must name one device, got 2"):
        single_device([CPU, CPU])
    with pytest.raises(ValueError, match="devices must name a device"):
        single_device([])
    with pytest.raises(TypeError, match="devices must be a sequence of DeviceRef"):
        single_device(["cpu"])  # type: ignore[list-item]


class Producer:
    """Shows an array through DLPack only, as another framework would."""

    def __init__(self, array: Any, kind: int = 1) -> None:
        self.array, self.kind = array, kind

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0


def test_other_producers_are_taken_without_a_copy() -> None:
    array = np.arange(6.0).reshape(2, 3)
    taken = as_array(Producer(array), CPU, "x")
    array[1, 2] = 99
    assert taken[1, 2] == 99


def test_numpy_arrays_are_taken_as_they_are() -> None:
    array = np.zeros((2, 3), ml_dtypes.bfloat16)
    assert as_array(array, CPU, "x") is array
    assert as_array(array, CPU, "x", array.dtype) is array


@pytest.mark.parametrize(
    ("value", "place", "words"),
    [
        ([1.0], CPU, "x must be an array on cpu:0, got builtins.list"),
        (None, CPU, "x must be an array on cpu:0, got builtins.NoneType"),
        (Producer(np.zeros(1), kind=2), CPU, "x must be an array on cpu:0, got .*Producer"),
        (np.zeros((2, 3)), DeviceRef.GPU(), r"on gpu:0, got a NumPy array \(2, 3\) of float64"),
        (Producer(np.zeros(1)), DeviceRef.GPU(), "x must be an array on gpu:0, got .*Producer"),
    ],
)
def test_what_is_elsewhere_is_refused(value: Any, place: DeviceRef, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        as_array(value, place, "x")


def test_dtype_is_never_cast() -> None:
    with pytest.raises(TypeError, match="x must be float32, got float64"):
        as_array(np.zeros(2), CPU, "x", np.dtype(np.float32))


def test_host_metadata_is_a_snapshot() -> None:
    ids = np.array([1, 2], np.int32)
    array, host = as_metadata(ids, CPU, "ids", (np.int32,))
    ids[0] = 7
    assert array[0] == 1
    assert host is not None
    assert host[0] == 1


def test_host_metadata_of_other_producers_is_a_snapshot_too() -> None:
    """So that its values are checked as those of a NumPy array are."""
    ids = np.array([1, 2], np.int32)
    array, host = as_metadata(Producer(ids), CPU, "ids", (np.int32,))
    ids[0] = 7
    assert host is not None
    assert (array[0], host[0]) == (1, 1)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint32(3), np.array(3), np.array([3], "u4")])
def test_integers_on_the_host(value: Any) -> None:
    result = integer(value, "layer_idx")
    assert result == 3
    assert type(result) is int


@pytest.mark.parametrize("value", [3.0, True, "3", None, np.array([1, 2]), np.array(3.0)])
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(TypeError, match="layer_idx must be an integer on the host"):
        integer(value, "layer_idx")
