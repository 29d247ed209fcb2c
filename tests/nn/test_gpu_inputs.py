"""What layers take from and give to other places; only a GPU can show it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorakit import AttentionWithRopeAndLoRA, DeviceRef, DType, KVCacheParams, LinearLoRA
from lorakit.nn import RotaryEmbedding
from lorakit.testing import assert_bitwise_equal


class InterfaceOnly:
    """An array of another library: nothing but ``__cuda_array_interface__``."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__


class DlpackOnly:
    """An array of another library: nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


@pytest.fixture
def layer(gpu: Any, rng: np.random.Generator) -> LinearLoRA:
    layer = LinearLoRA(32, 48, 2, 8, DType.float32, DeviceRef.GPU(gpu.cuda.Device().id))
    layer.load_state_dict({"weight": rng.standard_normal((48, 32), np.float32)})
    return layer


@pytest.mark.parametrize("producer", [InterfaceOnly, DlpackOnly])
def test_producers_on_the_gpu_are_taken_without_a_copy(
    producer: Any, layer: LinearLoRA, gpu: Any, rng: np.random.Generator
) -> None:
    from lorakit.nn.arrays import as_array

    x = gpu.asarray(rng.standard_normal((5, 32), np.float32))
    assert as_array(producer(x), layer.device, "x").data.ptr == x.data.ptr
    assert_bitwise_equal(layer(producer(x)).get(), layer(x).get())


def test_weights_are_copied_between_devices(
    layer: LinearLoRA, gpu: Any, rng: np.random.Generator
) -> None:
    weight, address = rng.standard_normal((48, 32), np.float32), layer.weight.data.ptr
    layer.load_state_dict({"weight": weight})
    assert layer.weight.data.ptr == address
    assert_bitwise_equal(layer.weight.get(), weight)

    on_cpu = LinearLoRA(32, 48, 2, 8, DType.float32, DeviceRef.CPU())
    on_cpu.load_state_dict(layer.state_dict())
    assert_bitwise_equal(on_cpu.weight, weight)


def test_inputs_elsewhere_are_refused(layer: LinearLoRA) -> None:
    with pytest.raises(TypeError, match="x must be an array on gpu"):
        layer(np.zeros((5, 32), np.float32))


def test_no_devices_means_the_current_gpu(gpu: Any) -> None:
    device = DeviceRef.current()
    assert device.is_gpu()
    layer = AttentionWithRopeAndLoRA(
        rope=RotaryEmbedding(32, 2, 10000.0, 16, device),
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=32,
        kv_params=KVCacheParams(DType.float32, 1, 16, page_size=4),
    )
    assert layer.devices == [device]
    assert isinstance(layer.q_proj.weight, gpu.ndarray)
