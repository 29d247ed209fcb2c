"""Copies of an attention layer stand on their own, and their q, k, v still share one base."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from lorakit import DeviceRef, build_lora_batch
from tests.nn.helpers import normal, offsets, setup

X = normal(30, 5, 40)


def run(s: Any, layer: Any, to_device: Any, to_host: Any) -> Any:
    s.manager.claim("a")
    collection = s.manager.fetch(["a"], [5])
    y = to_host(layer(1, to_device(X), collection, s.rope.freqs_cis, offsets(5)))
    s.manager.release("a")
    return y


@pytest.mark.parametrize("stacked_qkv", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_weights_written_into_a_copy_count(
    device: DeviceRef, to_device: Any, to_host: Any, copied: Any, stacked_qkv: bool
) -> None:
    s = setup(device, has_bias=True, stacked_qkv=stacked_qkv, max_num_loras=2, max_lora_rank=3)
    s.put(1, s.adapter(7, 2))
    s.layer.set_lora_batch_info(*build_lora_batch([1], offsets(5), [0, 2]))
    before = run(s, s.layer, to_device, to_host)
    other = copied(s.layer)
    assert other.o_proj.lora_B.strides == s.layer.o_proj.lora_B.strides
    np.testing.assert_array_equal(run(s, other, to_device, to_host), before)

    other.q_proj.weight[...] = 0
    other.k_proj.bias[...] = 7
    assert not to_host(other.wqkv)[:96].any()
    assert (to_host(other.wqkv_bias)[96:128] == 7).all()
    assert other.wqkv is other.wqkv
    assert (run(s, other, to_device, to_host) != before).any()
    np.testing.assert_array_equal(run(s, s.layer, to_device, to_host), before)

    other.load_state_dict(s.layer.state_dict())
    np.testing.assert_array_equal(to_host(other.q_proj.weight), to_host(s.layer.q_proj.weight))
    np.testing.assert_array_equal(run(s, other, to_device, to_host), before)


@pytest.mark.parametrize("stacked_qkv", [False, True])
def test_a_shallow_copy_shares_all_weights(
    device: DeviceRef, to_host: Any, stacked_qkv: bool
) -> None:
    s = setup(device, stacked_qkv=stacked_qkv)
    other = copy.copy(s.layer)
    other.v_proj.weight[...] = 3
    assert other.wqkv is s.layer.wqkv
    assert (to_host(s.layer.wqkv)[128:] == 3).all()
