"""Which rows share an adapter: found once per step, for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit import checks, jit, tiles
from lorakit.ops._metadata import check_segments, signed

Segments = tuple[Any, Any, Any]  # lora_ids, lora_ranks, lora_grouped_offsets


@dataclass(frozen=True, eq=False)
class LoRARoute:
    """The rows of a batch by adapter, as `sgmv_route` makes it and the other ops take it.

    Attributes:
        lora_ids, lora_ranks, lora_grouped_offsets: The batch metadata that it was made from.
        total_tokens: Rows of the batch.
        max_num_loras: Adapter slots.
        place: Where it is: "the CPU", "GPU 0".
        items: ``[1 + max_items, 4]`` int32, their number, then runs of up to `item_rows` rows of one
            adapter, as cuda_src/sgmv_route.cu lays them out. None on the CPU and where no row can have
            an adapter.
        rows: ``[max_items, item_rows]`` int32, the rows of each item; or None.
        counters: int32 zeros, in which the blocks of a launch count each other: a route serves one stream
            at a time. Or None.
        values: Copies of the metadata that was on the host, which may not change while the route is used.
    """

    lora_ids: Any
    lora_ranks: Any
    lora_grouped_offsets: Any
    total_tokens: int
    max_num_loras: int
    place: str
    items: Any = None
    rows: Any = None
    counters: Any = None
    values: tuple[Any, ...] = (None, None, None)

    @property
    def item_rows(self) -> int:
        return int(self.rows.shape[1])


def sgmv_route(
    x: Any, lora_ids: Any, lora_ranks: Any, lora_grouped_offsets: Any, *, max_num_loras: int
) -> LoRARoute:
    """Find the rows of each adapter, which every LoRA product of a step needs.

    Without it each call of the other ops finds them again. What it finds is of the metadata's values at
    the time that it runs: in a captured graph, of those at each replay.

    Args:
        x: ``[total_tokens, ...]``, any array of the batch: how many rows there are, and where.
        lora_ids, lora_ranks, lora_grouped_offsets: As in `sgmv_shrink`.
        max_num_loras: Adapter slots of the layers.

    Returns:
        What `route` of the other ops takes, with the same metadata, for any number of calls on one stream.

    Raises:
        ValueError, TypeError: Naming the argument.
    """
    if not hasattr(x, "shape") or not x.shape:
        raise TypeError(f"x must be an array [total_tokens, ...], got {type(x).__name__}")
    if isinstance(max_num_loras, bool) or not isinstance(max_num_loras, (int, np.integer)):
        raise TypeError(f"max_num_loras must be an integer, got {type(max_num_loras).__name__}")
    if max_num_loras < 0:
        raise ValueError(f"max_num_loras must not be negative, got {max_num_loras}")
    checks.place_of("x", x)
    segments = (lora_ids, lora_ranks, lora_grouped_offsets)
    check_segments(x, *segments, max_num_loras=int(max_num_loras))
    return make_route(x, segments, int(max_num_loras))


def check_route(route: Any, x: Any, segments: Segments, max_num_loras: int) -> None:
    """A route, if there is one, is of these rows, slots and arrays."""
    if route is None:
        return
    check_route_arrays(route, segments)
    if route.place != (place := jit.place_of(x)):
        raise TypeError(f"route must be on {place}, got {route.place}")
    sizes = {"total_tokens": x.shape[0], "max_num_loras": max_num_loras}
    for name, size in sizes.items():
        if (of_route := getattr(route, name)) != size:
            raise ValueError(f"route must be made for {name} = {size}, got {of_route}")


def check_route_arrays(route: Any, segments: Segments) -> None:
    """It is a route, and made from these arrays."""
    if not isinstance(route, LoRARoute):
        raise TypeError(f"route must be made by sgmv_route, got {type(route).__name__}")
    names = ("lora_ids", "lora_ranks", "lora_grouped_offsets")
    for name, array, values in zip(names, segments, route.values, strict=True):
        if not _is_same(array, getattr(route, name)):
            raise ValueError(
                f"route must be made from this {name}, got one made from another array"
            )
        if values is not None and not np.array_equal(values, array):
            raise ValueError(f"{name} must be as it was when route was made, got other values")


def _is_same(a: Any, b: Any) -> bool:
    """Whether both are the same memory, or both None."""
    if a is None or b is None:
        return a is b
    same = (a.shape, a.dtype, jit.place_of(a)) == (b.shape, b.dtype, jit.place_of(b))
    return same and checks.address_of(a) == checks.address_of(b)


def make_route(x: Any, segments: Segments, max_num_loras: int) -> LoRARoute:
    """`sgmv_route` after its checks."""
    lora_ids, lora_ranks, lora_grouped_offsets = segments
    total_tokens, groups = x.shape[0], lora_ids.shape[0]
    backend, what = jit.backend_of(x), (*segments, total_tokens, max_num_loras, jit.place_of(x))
    values = tuple(array.copy() if jit.is_host(array) else None for array in segments)
    if backend is None or total_tokens == 0 or groups == 0 or max_num_loras == 0:
        return LoRARoute(*what, values=values)
    # Each slot, and each group of another bound of the rank than its slot's first, is a class of its own.
    classes = max_num_loras + (0 if lora_ranks is None else groups)
    item_rows = tiles.sgmv_item_rows(total_tokens, min(groups, max_num_loras))
    used = min(total_tokens, groups, classes)  # at most, each with one item and those that it fills
    max_items = used + (total_tokens - used) // item_rows
    items = backend.zeros((1 + max_items, 4), np.int32)
    rows = backend.zeros((max_items, item_rows), np.int32)
    counters = backend.zeros((max_items * item_rows // 8, tiles.SGMV_COUNTERS), np.int32)
    offsets, places = signed(backend, lora_grouped_offsets), backend.empty((groups,), np.int32)
    is_small = total_tokens <= tiles.SGMV_ROUTE_THREADS
    backend.launch(
        tiles.sgmv_route_items(),
        (1,),
        [
            signed(backend, lora_ids),
            signed(backend, lora_ranks),
            offsets,
            items,
            places,
            rows if is_small else None,
            backend.empty((max_num_loras + 2 * classes,), np.int32),
            backend.error_word(),
            total_tokens,
            groups,
            max_num_loras,
            classes,
            item_rows,
        ],
    )
    if not is_small:
        grid = (-(-total_tokens // tiles.SGMV_ROUTE_THREADS),)
        backend.launch(tiles.sgmv_route_rows(), grid, [offsets, places, rows, total_tokens, groups])
    return LoRARoute(*what, items, rows, counters, values)
