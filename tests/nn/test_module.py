"""Names, and loading that is all or nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorakit import DeviceRef, DType, Linear, LinearLoRA, Module
from tests.nn.helpers import normal


class Block(Module):
    """A list of layers, a tuple and a plain attribute; hidden and foreign ones are not weights."""

    def __init__(self, device: DeviceRef) -> None:
        self.layers = [Linear(3, 2, DType.float32, device) for _ in range(2)]
        self.pair = (Linear(3, 2, DType.float32, device, name="up"), "text")
        self.lora = LinearLoRA(3, 2, 4, 5, DType.float32, device, True, True)
        self.count = 7
        self._hidden = Linear(3, 2, DType.float32, device)


BASE = ["layers.0.weight", "layers.1.weight", "pair.0.up.weight", "lora.weight", "lora.bias"]
ADAPTERS = ["lora.lora_A.weight", "lora.lora_B.weight", "lora.lora.bias"]


def test_names(device: DeviceRef) -> None:
    assert list(Block(device).state_dict()) == [*BASE, *ADAPTERS]


def test_state_dict_holds_the_arrays_themselves(device: DeviceRef, to_host: Any) -> None:
    block = Block(device)
    state = block.state_dict()
    state["layers.1.weight"][1, 2] = 5
    state["lora.lora_B.weight"][3, 1, 4] = 6
    assert to_host(block.layers[1].weight)[1, 2] == 5
    assert to_host(block.lora.lora_B)[3, 1, 4] == 6


def values(block: Block) -> dict[str, Any]:
    return {
        name: normal(i, *array.shape) for i, (name, array) in enumerate(block.state_dict().items())
    }


def test_loading_copies_into_the_same_arrays(device: DeviceRef, to_host: Any) -> None:
    block = Block(device)
    before = block.state_dict()
    state = values(block)
    block.load_state_dict(state)
    for name, array in before.items():
        np.testing.assert_array_equal(to_host(array), state[name])
        assert not np.shares_memory(to_host(array), state[name])
    other = Block(device)
    other.load_state_dict(before)  # from arrays of the device too
    np.testing.assert_array_equal(to_host(other.lora.lora_B), state["lora.lora_B.weight"])


def test_a_base_checkpoint_loads_strictly(device: DeviceRef) -> None:
    block = Block(device)
    state = values(block)
    block.load_state_dict({name: state[name] for name in BASE})


def test_strict_lists_all_missing_and_unexpected(device: DeviceRef, to_host: Any) -> None:
    block = Block(device)
    state = values(block)
    del state["layers.0.weight"], state["lora.bias"]
    state["layers.2.weight"] = state["lm_head.weight"] = np.zeros(1)
    with pytest.raises(
        ValueError,
        match=r"missing: layers\.0\.weight, lora\.bias; "
        r"unexpected: layers\.2\.weight, lm_head\.weight",
    ):
        block.load_state_dict(state)
    assert not to_host(block.layers[1].weight).any()
    block.load_state_dict(state, strict=False)
    np.testing.assert_array_equal(to_host(block.layers[1].weight), state["layers.1.weight"])
    assert not to_host(block.layers[0].weight).any()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (np.zeros((2, 3), np.float16), TypeError, "lora.weight must be float32, got float16"),
        (np.zeros((3, 2), "f4"), ValueError, r"lora.weight must have shape \(2, 3\), got \(3, 2\)"),
        (np.zeros((1, 3), "f4"), ValueError, "lora.weight must have shape"),
        ([[0.0] * 3] * 2, TypeError, "lora.weight must be an array, got builtins.list"),
    ],
)
def test_a_bad_value_writes_nothing(
    device: DeviceRef,
    to_host: Any,
    strict: bool,
    value: Any,
    error: type[Exception],
    words: str,
) -> None:
    block = Block(device)
    state = values(block) | {"lora.weight": value}
    with pytest.raises(error, match=words):
        block.load_state_dict(state, strict=strict)
    for array in block.state_dict().values():
        assert not to_host(array).any()


def test_a_read_only_array_in_the_layer_is_refused_before_anything_is_written() -> None:
    layer = Linear(4, 3, DType.float32, DeviceRef.CPU(), has_bias=True)
    assert layer.bias is not None
    layer.bias.flags.writeable = False
    state = {"weight": np.ones((3, 4), np.float32), "bias": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="bias must be writable in the layer"):
        layer.load_state_dict(state)
    assert not layer.weight.any()
