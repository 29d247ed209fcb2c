"""From one adapter per sequence to the metadata of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lorakit import checks, jit
from lorakit.nn.arrays import Array, integer, upload
from lorakit.nn.device import DeviceRef

# A slot, the name of an adapter, or the base model: None, "", its path, or any negative number.
Adapter: TypeAlias = "int | np.integer[Any] | str | None"

_BASE = -1


class LoRABatch(NamedTuple):
    """The arguments of ``set_lora_batch_info``, in its order.

    Attributes:
        lora_ids: ``[groups]`` int32, slot of each group; -1 is the base model.
        lora_ranks: ``[groups]`` uint32, rank of each group's adapter; 0 for the base model.
        lora_grouped_offsets: ``[groups + 1]`` uint32, first row of each group, then the rows in
            all.
    """

    lora_ids: Array
    lora_ranks: Array
    lora_grouped_offsets: Array


def build_lora_batch(
    adapters: Sequence[Adapter],
    input_row_offsets: NDArray[Any],
    ranks: Sequence[int] | Mapping[int, int] | NDArray[Any],
    *,
    slots: Mapping[str, int] | None = None,
    base_path: str | None = None,
    num_groups: int | None = None,
    device: DeviceRef | None = None,
) -> LoRABatch:
    """Group the rows of a ragged batch by adapter; neighbours with the same adapter share a group.

    ::

        adapters             [0, 0, 1, None]        ranks [8, 4]
        input_row_offsets    [0, 5, 10, 20, 22]

        lora_ids             [0, 1, -1]
        lora_ranks           [8, 4, 0]
        lora_grouped_offsets [0, 10, 20, 22]

    Args:
        adapters: One for each sequence: a slot, a name in `slots`, or the base model (None, ``""``,
            `base_path`, a negative number).
        input_row_offsets: ``[batch_size + 1]`` uint32 or int32, on the host.
        ranks: Rank of the adapter in each slot: a sequence over slots, or a mapping from slot.
        slots: Adapter name -> slot.
        base_path: Another name of the base model.
        num_groups: Pad with empty base groups to this many, for a captured graph with fixed shapes.
        device: Put the arrays there; None: NumPy arrays, which layers check and copy.

    Raises:
        ValueError: Lengths differ, offsets are not in order, an unknown name, a slot without a
            rank, a negative rank, or more groups than `num_groups`.
        TypeError: An adapter of another type, or offsets that are not such an array.
    """
    if not jit.is_host(input_row_offsets):
        raise TypeError(
            f"input_row_offsets must be a NumPy array, got {type(input_row_offsets).__name__}"
        )
    checks.check_dtype(checks.OFFSET_DTYPES, input_row_offsets=input_row_offsets)
    sizes = checks.check_shapes(input_row_offsets=(input_row_offsets, "batch_size+1"))
    rows = int(input_row_offsets[-1])
    checks.check_offsets("input_row_offsets", input_row_offsets, rows, exact=True)
    if len(adapters) != sizes["batch_size"]:
        raise ValueError(
            f"adapters must have one entry for each of {sizes['batch_size']} sequences, "
            f"got {len(adapters)}"
        )
    ids = _slots_of(adapters, slots, base_path)

    firsts = [b for b, slot in enumerate(ids) if b == 0 or slot != ids[b - 1]]
    group_ids = [ids[b] for b in firsts]
    group_ranks = [_rank_of(slot, ranks) for slot in group_ids]
    offsets = [int(input_row_offsets[b]) for b in firsts] + [rows]

    if num_groups is not None:
        padding = integer(num_groups, "num_groups") - len(group_ids)
        if padding < 0:
            raise ValueError(f"num_groups must be at least {len(group_ids)}, got {num_groups}")
        group_ids += [_BASE] * padding
        group_ranks += [0] * padding
        offsets += [rows] * padding
    arrays = (
        np.array(group_ids, np.int32),
        np.array(group_ranks, np.uint32),
        np.array(offsets, np.uint32),
    )
    return LoRABatch(*(array if device is None else upload(array, device) for array in arrays))


def sort_lora_batch(
    adapters: Sequence[Adapter],
    *,
    slots: Mapping[str, int] | None = None,
    base_path: str | None = None,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """An order of the sequences that brings equal adapters together: slots descending, base last.

    Sorting is never needed for a right result; it makes groups large. Sequences with the same
    adapter keep their order (MAX ``sort_lora_batch``)::

        order, inverse = sort_lora_batch(adapters)
        sorted_prompts = [prompts[b] for b in order]
        ...
        results = [sorted_results[i] for i in inverse]  # results[b] belongs to prompts[b]

    Args:
        adapters, slots, base_path: As in `build_lora_batch`.

    Returns:
        ``order[i]``: which sequence comes at place ``i``; ``inverse[b]``: the place of sequence
        ``b``.
    """
    ids = np.array(_slots_of(adapters, slots, base_path), np.int64)
    order = np.argsort(-ids, kind="stable")
    return order, np.argsort(order)


def _slots_of(
    adapters: Sequence[Adapter], slots: Mapping[str, int] | None, base_path: str | None
) -> list[int]:
    return [_slot_of(adapter, slots or {}, base_path) for adapter in adapters]


def _slot_of(adapter: Adapter, slots: Mapping[str, int], base_path: str | None) -> int:
    if adapter is None or adapter == "" or (isinstance(adapter, str) and adapter == base_path):
        return _BASE
    if isinstance(adapter, str):
        if adapter not in slots:
            raise ValueError(f"adapters must be names in slots, got {adapter!r}")
        adapter = integer(slots[adapter], "slots")
        if adapter < 0:  # a name asks for an adapter, never for the base model
            raise ValueError(f"slots must not be negative, got {adapter}")
    return max(integer(adapter, "adapters"), _BASE)


def _rank_of(slot: int, ranks: Sequence[int] | Mapping[int, int] | NDArray[Any]) -> int:
    if slot == _BASE:
        return 0
    known = slot in ranks if isinstance(ranks, Mapping) else slot < len(ranks)
    if not known:
        raise ValueError(f"ranks must have the rank of slot {slot}, got {ranks!r}")
    rank = integer(ranks[slot], "ranks")
    if rank < 0:
        raise ValueError(f"ranks must not be negative, got {rank} for slot {slot}")
    return rank
