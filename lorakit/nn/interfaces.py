"""What a layer with adapters promises."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lorakit.nn.arrays import Array


@runtime_checkable
class SupportsLoRA(Protocol):
    """A layer that applies one of several adapters to each group of rows (MAX `SupportsLoRA`).

    ``isinstance`` is structural: any object with both methods passes. `LinearLoRA` is the layer to
    read.
    """

    def set_lora_batch_info(
        self, lora_ids: Array, lora_ranks: Array, lora_grouped_offsets: Array
    ) -> None:
        """Say which adapter each group of rows of the next batches uses.

        Args:
            lora_ids: ``[groups]`` int32, slot of each group; negative: base model.
            lora_ranks: ``[groups]`` uint32 or int32, upper bound of each group's rank.
            lora_grouped_offsets: ``[groups + 1]`` uint32 or int32, first row of each group, then
                the end of the last.
        """
        ...

    def apply_lora(self, x: Array) -> Array:
        """The layer's result with each row's adapter added."""
        ...
