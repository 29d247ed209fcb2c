"""What ops and layers check before they write anything.

Shapes, dtypes, memory layout and device are visible on the host for every array; values only for host
arrays. Each check raises `ValueError` or `TypeError` naming the argument, what was wanted and what came.
Nothing is repaired: no cast, copy or clamp.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lorakit import jit

OFFSET_DTYPES = (np.dtype(np.uint32), np.dtype(np.int32))


def check_shapes(**arrays: tuple[Any, str]) -> dict[str, int]:
    """Match each array's shape with named axes; equal names must have equal sizes.

    Args:
        arrays: ``name=(array, "axis axis ...")``. An axis is a name, a name with ``+1``, or a number.

    Returns:
        The size of each axis name.

    Raises:
        TypeError: Not an array.
        ValueError: Wrong number of axes, or two sizes for one name; the message says where both were seen.
    """
    sizes: dict[str, int] = {}
    seen: dict[str, str] = {}
    for name, (array, axes) in arrays.items():
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array [{axes}], got {type(array).__name__}")
        wanted = axes.split()
        if len(array.shape) != len(wanted):
            raise ValueError(
                f"{name} must have shape [{', '.join(wanted)}], got {tuple(array.shape)}"
            )
        for axis, size in zip(wanted, array.shape, strict=True):
            base = axis.removesuffix("+1")
            value = int(size) - (axis != base)
            if base.isdigit():
                if value != int(base):
                    raise ValueError(
                        f"{name} must have shape [{', '.join(wanted)}], got {tuple(array.shape)}"
                    )
            elif value < 0:
                raise ValueError(
                    f"{name} must have at least one element ({axis}), got {tuple(array.shape)}"
                )
            elif sizes.setdefault(base, value) != value:
                raise ValueError(f"{name} has {base} = {value}, but {seen[base]} has {sizes[base]}")
            else:
                seen.setdefault(base, name)
    return sizes


def check_dtype(dtypes: Iterable[Any], **arrays: Any) -> None:
    """Each array has one of these dtypes, else `TypeError`."""
    wanted = [np.dtype(dtype) for dtype in dtypes]
    for name, array in arrays.items():
        if np.dtype(array.dtype) not in wanted:
            names = " or ".join(str(dtype) for dtype in wanted)
            raise TypeError(f"{name} must be {names}, got {array.dtype}")


def check_contiguous(**arrays: Any) -> None:
    """Each array is C-contiguous and starts at a multiple of 16 bytes, else `ValueError`."""
    check_vectors(**arrays)
    for name, array in arrays.items():
        _check_aligned(name, array, (address_of(array),))


def check_vectors(**arrays: Any) -> None:
    """Each array is C-contiguous, else `ValueError`; its address may be any."""
    for name, array in arrays.items():
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be C-contiguous, got strides {tuple(array.strides)}")


def check_rows(**arrays: Any) -> None:
    """Each array is C-contiguous except that its rows (first axis) may lie apart, else `ValueError`."""
    for name, array in arrays.items():
        if array.size and not array[0].flags.c_contiguous:
            raise ValueError(
                f"{name} must be C-contiguous within a row, got strides {tuple(array.strides)}"
            )
        if array.size and array.strides[0] < 0:
            raise ValueError(
                f"{name} must have rows in ascending order, got strides {tuple(array.strides)}"
            )


def check_whole_strides(**arrays: Any) -> None:
    """Each array's strides are whole elements, else `ValueError`."""
    for name, array in arrays.items():
        if any(stride % array.dtype.itemsize for stride in array.strides):
            raise ValueError(
                f"{name} must have strides of whole elements, got strides {tuple(array.strides)}"
            )


def check_rows_apart(**arrays: Any) -> None:
    """As `check_rows`, and no two rows share memory."""
    check_rows(**arrays)
    for name, array in arrays.items():
        if array.size and len(array) > 1 and array.strides[0] < array[0].nbytes:
            raise ValueError(
                f"{name} must have rows that do not overlap, got strides {tuple(array.strides)}"
            )


def check_aligned_rows(**arrays: Any) -> None:
    """As `check_rows`, and every row starts at a multiple of 16 bytes (one vector load)."""
    check_rows(**arrays)
    for name, array in arrays.items():
        if array.size:
            _check_aligned(name, array, (address_of(array), array.strides[0]))


def check_cache_rows(**arrays: Any) -> None:
    """Rows of each array, along its last axis, lie together and apart from each other, else `ValueError`.

    They start at multiples of 16 bytes. Along one axis they lie further apart than all rows along the axes
    of smaller strides reach, as in every layout whose axes are nested, in any order.
    """
    for name, array in arrays.items():
        if not array.size:
            continue
        if array.strides[-1] != array.dtype.itemsize:
            raise ValueError(
                f"{name} must be contiguous along head_dim, got strides {tuple(array.strides)}"
            )
        pairs = zip(array.strides[:-1], array.shape[:-1], strict=True)
        axes = sorted((stride, size) for stride, size in pairs if size > 1)
        _check_aligned(name, array, (address_of(array), *(stride for stride, _ in axes)))
        reach = array.shape[-1] * array.dtype.itemsize
        for stride, size in axes:
            if stride < reach:
                raise ValueError(
                    f"{name} must have rows that do not overlap, in ascending order, got strides "
                    f"{tuple(array.strides)}"
                )
            reach += stride * (size - 1)


def check_disjoint(name: str, a: Any, b: Any) -> None:
    """No element of one array is one of the other's, else `ValueError`."""
    memory_a, memory_b = np.asarray(_Memory(a)), np.asarray(_Memory(b))
    if np.may_share_memory(memory_a, memory_b) and np.shares_memory(memory_a, memory_b):
        raise ValueError(f"{name} must be arrays that do not overlap")


class _Memory:
    """The memory of an array on any device, for NumPy's arithmetic of addresses; not to be read."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {
            "data": (address_of(array), True),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.dtype.itemsize}",
            "version": 3,
        }


def check_same_place(**arrays: Any) -> None:
    """All arrays live in the memory of one device (or all on the host), else `TypeError`."""
    places = {name: place_of(name, array) for name, array in arrays.items()}
    first = next(iter(places))
    for name, place in places.items():
        if place != places[first]:
            raise TypeError(f"{name} must be on {places[first]} as {first} is, got {place}")


def place_of(name: str, array: Any) -> str:
    """`jit.place_of`, whose `TypeError` names the argument."""
    try:
        return jit.place_of(array)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def check_offsets(name: str, offsets: Any, rows: int, *, exact: bool, start: bool = True) -> None:
    """Row offsets start at 0, never decrease, and end at ``rows`` (`exact`) or before.

    Values are checked for host arrays only; the kernels guard themselves against the rest.
    """
    if not jit.is_host(offsets):
        return
    values = offsets.astype(np.int64)
    if start and values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    if np.any(np.diff(values) < 0):
        at = int(np.argmax(np.diff(values) < 0))
        raise ValueError(f"{name} must not decrease, got {values[at]} before {values[at + 1]}")
    last = int(values[-1] - (0 if start else values[0]))
    if last > rows or (exact and last != rows):
        raise ValueError(
            f"{name} must end at {'' if exact else 'most '}{rows}, the number of rows, got {last}"
        )


def check_ids(lora_ids: Any, max_num_loras: int) -> None:
    """Every slot is below ``max_num_loras`` (negative: base model); host arrays only."""
    if jit.is_host(lora_ids) and lora_ids.size and int(lora_ids.max()) >= max_num_loras:
        raise ValueError(
            f"lora_ids must be below max_num_loras = {max_num_loras}, got {int(lora_ids.max())}"
        )


def check_ranks(name: str, ranks: Any) -> None:
    """No rank is negative; host arrays only. Ranks above the stored rank mean the stored rank."""
    if jit.is_host(ranks) and ranks.size and int(ranks.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {int(ranks.min())}")


def cache_arrays(
    kv_collection: Any, layer_idx: int, page: str = "page_size n_kv_heads head_dim"
) -> dict[str, tuple[Any, str]]:
    """What holds a layer of a paged cache: arrays and their axes, by the names that messages give them.

    All layers in ``blocks``, or the layer's own keys and values, which must be there; `page` names the axes
    of a page.
    """
    if hasattr(kv_collection, "blocks"):
        return {"blocks": (kv_collection.blocks, f"num_pages 2 num_layers {page}")}
    parts = {"keys": kv_collection.keys, "values": kv_collection.values}
    for name, arrays in parts.items():
        if not isinstance(arrays, Sequence):
            raise TypeError(
                f"{name} must be a sequence with an array for each layer, got {type(arrays).__name__}"
            )
    if len(parts["keys"]) != len(parts["values"]):
        raise ValueError(
            f"values must have an array for each of {len(parts['keys'])} layers, as keys, got "
            f"{len(parts['values'])}"
        )
    check_layer_idx(layer_idx, len(parts["keys"]))
    return {
        f"{name}[{layer_idx}]": (arrays[layer_idx], f"num_pages {page}")
        for name, arrays in parts.items()
    }


def check_pages(
    kv_collection: Any,
    input_row_offsets: Any,
    *,
    num_pages: int,
    page_size: int,
    batch_offset: int = 0,
) -> None:
    """Every position of this step has a page inside the cache, as far as the host can see the arrays."""
    cached = kv_collection.cache_lengths
    if jit.is_host(cached) and cached.size and int(cached.min()) < 0:
        raise ValueError(f"cache_lengths must not be negative, got {int(cached.min())}")
    arrays = (cached, kv_collection.lookup_table, input_row_offsets)
    if not all(jit.is_host(array) for array in arrays):
        return
    new = np.diff(input_row_offsets.astype(np.int64))
    lengths = cached.astype(np.int64)[batch_offset : batch_offset + len(new)] + new
    table = kv_collection.lookup_table[batch_offset : batch_offset + len(new)].astype(np.int64)
    for sequence, (length, row) in enumerate(zip(lengths, table, strict=True), start=batch_offset):
        needed = -(-int(length) // page_size)
        if needed > len(row):
            raise ValueError(
                f"lookup_table must have {needed} pages for the {length} tokens of sequence {sequence}, "
                f"got {len(row)}"
            )
        live = row[:needed]
        if needed and (int(live.min()) < 0 or int(live.max()) >= num_pages):
            bad = int(live[(live < 0) | (live >= num_pages)][0])
            raise ValueError(
                f"lookup_table must hold pages in [0, {num_pages}) for the {length} tokens of sequence "
                f"{sequence}, got {bad}"
            )


def check_max_lengths(kv_collection: Any, input_row_offsets: Any) -> int:
    """The most new tokens that a sequence has, as ``max_lengths`` says, which host-visible offsets obey."""
    steps = kv_collection.max_lengths
    shape = tuple(getattr(steps, "shape", ()))
    if len(shape) != 2 or shape[0] < 1 or shape[1] != 2:
        raise ValueError(
            f"kv_collection.max_lengths must have shape [steps, 2], at least a step, got {shape}"
        )
    if not jit.is_host(steps):
        raise TypeError(f"kv_collection.max_lengths must be on the CPU, got {jit.place_of(steps)}")
    most = int(steps[0, 0])
    if jit.is_host(input_row_offsets):
        new = int(np.diff(input_row_offsets.astype(np.int64)).max(initial=0))
        if new > most:
            raise ValueError(
                f"kv_collection.max_lengths says that no sequence has more than {most} new tokens, but "
                f"input_row_offsets has one with {new}"
            )
    return most


def check_positions(freqs_cis: Any, kv_collection: Any, input_row_offsets: Any) -> None:
    """Every position of this step has a row in the rotary table, as far as the host can see."""
    if not (jit.is_host(kv_collection.cache_lengths) and jit.is_host(input_row_offsets)):
        return
    new = np.diff(input_row_offsets.astype(np.int64))
    lengths = kv_collection.cache_lengths.astype(np.int64) + new
    if np.any(new > 0) and int(lengths[new > 0].max()) > freqs_cis.shape[0]:
        raise ValueError(
            f"freqs_cis must have a row for each of {int(lengths[new > 0].max())} positions, "
            f"got {freqs_cis.shape[0]}"
        )


def check_number(value: Any, name: str) -> float:
    """A real number, of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_window(window: Any) -> tuple[int | None, int | None]:
    """`window` as (keys before, keys after), None where there is no bound."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window must be None or a pair (left, right), got {type(window).__name__}")
    if len(window) != 2:
        raise ValueError(f"window must be a pair (left, right), got {len(window)} values")
    sides: list[int | None] = []
    for side, name in zip(window, ("left", "right"), strict=True):
        if side is None:
            sides.append(None)
            continue
        if isinstance(side, bool) or not isinstance(side, (int, np.integer)):
            raise TypeError(
                f"window must have integers or None, got {type(side).__name__} on the {name}"
            )
        if side < 0:
            raise ValueError(f"window must not be negative, got {side} on the {name}")
        sides.append(int(side))
    return sides[0], sides[1]


def check_soft_cap(soft_cap: Any) -> float | None:
    """`soft_cap` is None, or positive and finite: so that it and its reciprocal are float32 numbers."""
    if soft_cap is None:
        return None
    cap = check_number(soft_cap, "soft_cap")
    if not 2.0**-126 <= cap <= 2.0**126:
        raise ValueError(
            f"soft_cap must be None or positive and finite, from 2**-126 to 2**126, got {soft_cap}"
        )
    return cap


def check_sinks(sinks: Any, n_heads: int, dtype: Any) -> None:
    """`sinks` is a score for each of `n_heads` heads, in float32 or `dtype`."""
    check_shapes(sinks=(sinks, f"{n_heads}"))
    check_dtype(dict.fromkeys((np.dtype(np.float32), np.dtype(dtype))), sinks=sinks)
    check_vectors(sinks=sinks)


def check_head_dim(head_dim: int) -> None:
    """``head_dim`` is one that kernels take."""
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"head_dim must be a multiple of 8 up to 256, got {head_dim}")


def check_layer_idx(layer_idx: Any, num_layers: int) -> None:
    """``layer_idx`` is an integer that names a layer of the cache."""
    if isinstance(layer_idx, bool) or not isinstance(layer_idx, (int, np.integer)):
        raise TypeError(f"layer_idx must be an integer, got {type(layer_idx).__name__}")
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"layer_idx must be in [0, {num_layers}), got {layer_idx}")


def address_of(array: Any) -> int:
    """The address of the first element."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def is_aligned(*arrays: Any) -> bool:
    """Every row of every array starts at a multiple of 16 bytes."""
    return all(
        address_of(array) % 16 == 0 and all(stride % 16 == 0 for stride in array.strides[:-1])
        for array in arrays
        if array.size
    )


def _check_aligned(name: str, array: Any, numbers: tuple[int, ...]) -> None:
    if array.size and any(number % 16 for number in numbers):
        raise ValueError(
            f"{name} must start each row at a multiple of 16 bytes, got address {numbers[0]:#x} and "
            f"strides {tuple(array.strides)}"
        )
