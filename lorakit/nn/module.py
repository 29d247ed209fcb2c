"""Names for weights, and loading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lorakit import checks
from lorakit.nn.arrays import Array, as_any_array, copy_into


class NamedWeight(NamedTuple):
    """One entry of a state dict.

    Attributes:
        name: Attribute path and weight name, joined by dots.
        array: The array the layer computes with.
        optional: True for adapter weights: they start as zeros and are never missing.
        after_load: Called after new values were loaded into `array`.
    """

    name: str
    array: Array
    optional: bool = False
    after_load: Callable[[], None] | None = None


class Module:
    """A layer with named weights (MAX `max.nn.Module`).

    A sub-module is any public attribute that is a `Module`, or a list or tuple of them; its weights
    are named ``attribute.weight_name`` or ``attribute.index.weight_name``.
    """

    def own_weights(self) -> Iterator[NamedWeight]:
        """The weights of this layer itself, without those of its sub-modules."""
        yield from ()

    def named_weights(self) -> Iterator[NamedWeight]:
        """All weights, this layer's first, then each sub-module's in order of assignment."""
        yield from self.own_weights()
        for path, child in self._children():
            for weight in child.named_weights():
                yield weight._replace(name=f"{path}.{weight.name}")

    def state_dict(self) -> dict[str, Array]:
        """The arrays the layers compute with, by name; writing into one changes the next result."""
        return {weight.name: weight.array for weight in self.named_weights()}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Copy values into the layers' arrays, all or nothing.

        MAX's ``override_quantization_encoding`` and ``weight_alignment`` are left out: they concern
        quantized weights in graphs.

        Args:
            state: An array for each name of `state_dict`, of the same shape and dtype, on any
                device. Adapter weights (``lora_A.weight``, ``lora_B.weight``, ``lora.bias``) may be
                left out. Values must not be views of other weights of this module.
            strict: False allows missing and ignores unexpected names.

        Raises:
            ValueError: Missing or unexpected names (all are listed), or a wrong shape.
            TypeError: A value is no array or has another dtype (never cast).
        """
        weights = {weight.name: weight for weight in self.named_weights()}
        if strict:
            _check_names(weights, state)
        loaded = {name: as_any_array(state[name], name) for name in weights if name in state}
        for name, value in loaded.items():
            array = weights[name].array
            checks.check_dtype((array.dtype,), **{name: value})
            if value.shape != array.shape:
                raise ValueError(f"{name} must have shape {array.shape}, got {value.shape}")
            if isinstance(array, np.ndarray) and not array.flags.writeable:
                raise ValueError(f"{name} must be writable in the layer, got a read-only array")
        for name, value in loaded.items():
            copy_into(weights[name].array, value)
        for name in loaded:
            if (after_load := weights[name].after_load) is not None:
                after_load()

    def _children(self) -> Iterator[tuple[str, Module]]:
        for attribute, value in vars(self).items():
            if attribute.startswith("_"):
                continue
            if isinstance(value, Module):
                yield attribute, value
            elif isinstance(value, (list, tuple)):
                for index, item in enumerate(value):
                    if isinstance(item, Module):
                        yield f"{attribute}.{index}", item


def _check_names(weights: Mapping[str, NamedWeight], state: Mapping[str, Any]) -> None:
    missing = [name for name, w in weights.items() if name not in state and not w.optional]
    unexpected = [name for name in state if name not in weights]
    problems = []
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected:
        problems.append(f"unexpected: {', '.join(unexpected)}")
    if problems:
        raise ValueError(
            f"state must hold exactly the weights of the module; {'; '.join(problems)}"
        )
