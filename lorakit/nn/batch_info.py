"""Which adapter each group of rows uses, checked and on a layer's device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lorakit import checks
from lorakit.nn.arrays import Array, as_any_array, as_metadata
from lorakit.nn.device import DeviceRef
from lorakit.ops.sgmv_route import LoRARoute, check_route, check_route_arrays


class BatchInfo(NamedTuple):
    """What `LinearLoRA.set_lora_batch_info` keeps: on the device, but with a route where its arrays are.

    Attributes:
        lora_ids: ``[groups]`` int32.
        lora_ranks: ``[groups]`` uint32 or int32, or None: no bound.
        lora_grouped_offsets: ``[groups + 1]`` uint32 or int32.
        host_offsets: The offsets as the host saw them, or None when they came from the device.
        route: What `ops.sgmv_route` made from the three arrays, or None.
    """

    lora_ids: Array
    lora_ranks: Array | None
    lora_grouped_offsets: Array
    host_offsets: np.ndarray[Any, Any] | None
    route: LoRARoute | None = None

    @classmethod
    def checked(
        cls,
        lora_ids: Array,
        lora_ranks: Array | None,
        lora_grouped_offsets: Array,
        device: DeviceRef,
        max_num_loras: int,
        route: LoRARoute | None = None,
    ) -> BatchInfo | None:
        """The info for these arguments, or None for three Nones.

        Raises:
            ValueError, TypeError: As `LinearLoRA.set_lora_batch_info` says.
        """
        if lora_ids is None and lora_ranks is None and lora_grouped_offsets is None:
            return None
        ids, host_ids = as_metadata(lora_ids, device, "lora_ids", (np.int32,))
        offsets, host_offsets = as_metadata(
            lora_grouped_offsets, device, "lora_grouped_offsets", checks.OFFSET_DTYPES
        )
        arrays = {"lora_ids": (ids, "groups"), "lora_grouped_offsets": (offsets, "groups+1")}
        ranks = host_ranks = None
        if lora_ranks is not None:
            ranks, host_ranks = as_metadata(lora_ranks, device, "lora_ranks", checks.OFFSET_DTYPES)
            arrays["lora_ranks"] = (ranks, "groups")
        checks.check_shapes(**arrays)

        if host_ids is not None:
            checks.check_ids(host_ids, max_num_loras)
        if host_ranks is not None:
            checks.check_ranks("lora_ranks", host_ranks)
        if host_offsets is not None:  # how many rows there are is known at the call
            last = int(host_offsets[-1])
            checks.check_offsets("lora_grouped_offsets", host_offsets, last, exact=True)
        if route is None:
            return cls(ids, ranks, offsets, host_offsets)
        given = {
            "lora_ids": lora_ids,
            "lora_ranks": lora_ranks,
            "lora_grouped_offsets": lora_grouped_offsets,
        }
        ids, ranks, offsets = (
            None if array is None else as_any_array(array, name) for name, array in given.items()
        )
        check_route_arrays(route, (ids, ranks, offsets))
        return cls(ids, ranks, offsets, host_offsets, route)

    def check_rows(self, rows: Array, max_num_loras: int) -> None:
        """`ValueError` if the groups end past the last row, as far as the host knows.

        Raises:
            ValueError, TypeError: As well, the route is of other rows, slots or another device.
        """
        segments = (self.lora_ids, self.lora_ranks, self.lora_grouped_offsets)
        check_route(self.route, rows, segments, max_num_loras)
        if self.host_offsets is not None:
            checks.check_offsets("lora_grouped_offsets", self.host_offsets, len(rows), exact=False)
