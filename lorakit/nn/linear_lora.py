"""A dense layer with a stack of LoRA adapters beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lorakit import checks, ops
from lorakit.dtypes import STORAGE
from lorakit.nn.arrays import (
    Array,
    as_any_array,
    copy_into,
    fill,
    integer,
    positive,
    rounded,
    upload,
    zeros,
)
from lorakit.nn.batch_info import BatchInfo
from lorakit.nn.device import DeviceRef
from lorakit.nn.dtype import DType
from lorakit.nn.interfaces import SupportsLoRA
from lorakit.nn.linear import Linear
from lorakit.nn.module import NamedWeight


class LinearLoRA(Linear, SupportsLoRA):
    """A dense layer with ``max_num_loras`` adapters, one of them for each group of rows.

    For row ``t`` of a group with slot ``s``, where ``A = lora_A[s]``, ``B = lora_B[s]``::

        y[t] = x[t] @ weight.T + bias + (x[t] @ A.T) @ B.T + lora_bias[s]

    and for a negative slot the first two terms alone. No scaling appears: `set_adapter` folds it
    into B, and whoever writes ``lora_B`` by hand does the same.

    Args:
        in_dim: Features of the input.
        out_dim: Features of the output.
        max_num_loras: Adapter slots.
        max_lora_rank: Rank each slot is stored at.
        dtype: float32, float16 or bfloat16, of all weights and activations.
        device: Where the weights live and where inputs must be.
        has_bias: Adds the base bias.
        has_lora_bias: Adds ``lora_bias``, one row per slot (declared but never added by MAX 25.6).
        name: Prefix of the three adapter weights' names, not of the base's.
        quantization_encoding: Not implemented.
        float8_config: Not implemented.

    Attributes:
        weight: ``[out_dim, in_dim]``, named ``weight``.
        bias: ``[out_dim]`` or None, named ``bias``.
        lora_A: ``[max_num_loras, max_lora_rank, in_dim]``, writable, named ``lora_A.weight``.
        lora_B: ``[max_num_loras, out_dim, max_lora_rank]``, writable, named ``lora_B.weight``. It
            is a view: underneath, all features of one rank lie together, so that an adapter of low
            rank is read as one short block.
        lora_bias: ``[max_num_loras, out_dim]`` or None, named ``lora.bias``.
        slot_ranks: ``[max_num_loras]`` int32: rows of A and columns of B that count in each slot.
            Full rank until `set_adapter` or `set_slot_rank` says otherwise.
        batch_info: What `set_lora_batch_info` took, on the device, or None.

    Adapter weights are written in place and take effect at the next call.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        max_num_loras: int,
        max_lora_rank: int,
        dtype: DType,
        device: DeviceRef,
        has_bias: bool = False,
        has_lora_bias: bool = False,
        name: str | None = None,
        quantization_encoding: Any = None,
        float8_config: Any = None,
    ) -> None:
        slots, rank = positive(max_num_loras=max_num_loras, max_lora_rank=max_lora_rank)
        super().__init__(
            in_dim, out_dim, dtype, device, has_bias, quantization_encoding, float8_config
        )
        self.max_num_loras, self.max_lora_rank = slots, rank
        self._lora_prefix = f"{name}." if name else ""
        array_dtype = dtype.to_numpy()
        self.lora_A = zeros((slots, rank, self.in_dim), array_dtype, device)
        self.lora_B = self._rank_major_b()
        self.lora_bias: Array | None = (
            zeros((slots, self.out_dim), array_dtype, device) if has_lora_bias else None
        )
        self.slot_ranks = upload(np.full(slots, rank, np.int32), device)
        self.batch_info: BatchInfo | None = None

    def own_weights(self) -> Iterator[NamedWeight]:
        yield from super().own_weights()
        prefix, full = self._lora_prefix, self._reset_slot_ranks
        yield NamedWeight(f"{prefix}lora_A.weight", self.lora_A, True, full)
        yield NamedWeight(f"{prefix}lora_B.weight", self.lora_B, True, full)
        if self.lora_bias is not None:
            yield NamedWeight(f"{prefix}lora.bias", self.lora_bias, True)

    # ---- Calls ----------------------------------------------------------------------------------

    def set_lora_batch_info(
        self,
        lora_ids: Array,
        lora_ranks: Array,
        lora_grouped_offsets: Array,
        *,
        route: ops.LoRARoute | None = None,
    ) -> None:
        """Say which adapter each group of rows uses from now on; three Nones: none any more.

        Host arrays are checked and copied to the device once. Device arrays are kept by reference:
        rewrite them in place to replay a CUDA graph with another batch.

        Args:
            lora_ids: ``[groups]`` int32, slot of each group; negative: base model.
            lora_ranks: ``[groups]`` uint32 or int32, upper bound of each group's rank, or None.
            lora_grouped_offsets: ``[groups + 1]`` uint32 or int32. Group ``g`` has the rows from
                ``[g]`` up to ``[g + 1]``; rows after the last offset are base rows. With one id per
                sequence this is ``input_row_offsets``.
            route: What `lorakit.ops.sgmv_route` made from these very arrays, for all layers of a step.
                None: each call finds the rows of each adapter again.

        Raises:
            ValueError: Wrong lengths, a route of other arrays; on the host also an id at or above
                ``max_num_loras``, a negative rank, offsets that do not start at 0 or that decrease. The
                old info stays.
            TypeError: No array, another dtype, or another device.
        """
        self.batch_info = BatchInfo.checked(
            lora_ids, lora_ranks, lora_grouped_offsets, self.device, self.max_num_loras, route
        )

    def apply_lora(self, x: Array) -> Array:
        """Base result plus each row's adapter.

        Args:
            x: ``[..., in_dim]``, C-contiguous; the leading axes are flattened to rows.

        Returns:
            ``[..., out_dim]``, a new array of the layer's dtype.

        Raises:
            ValueError: `set_lora_batch_info` was never called, or the groups end past the last row.
            TypeError: Wrong dtype or device.
        """
        if self.batch_info is None:
            raise ValueError("set_lora_batch_info must be called before apply_lora")
        rows, leading = self._rows(x)
        self.batch_info.check_rows(rows, self.max_num_loras)
        y = self._base(rows)
        self.add_delta(rows, y, self.batch_info)
        return y.reshape(*leading, self.out_dim)

    def __call__(self, x: Array) -> Array:
        """`apply_lora` when batch info is set, else the base result (MAX 25.6: always the base)."""
        return super().__call__(x) if self.batch_info is None else self.apply_lora(x)

    def add_delta(self, rows: Array, y: Array, info: BatchInfo) -> None:
        """Add each row's adapter to `y` in place, rounding the sum once.

        Args:
            rows: ``[rows, in_dim]``.
            y: ``[rows, out_dim]``; rows may lie apart.
            info: Which adapter each row uses.
        """
        ops.sgmv_lora(
            rows,
            self.lora_A,
            self.lora_B,
            info.lora_ids,
            info.lora_ranks,
            info.lora_grouped_offsets,
            slot_ranks=self.slot_ranks,
            bias=self.lora_bias,
            add_to=y,
            route=info.route,
        )

    @property
    def lora_ids(self) -> Array | None:
        """The slots that `set_lora_batch_info` took, on the device; None when unset."""
        return None if self.batch_info is None else self.batch_info.lora_ids

    @property
    def lora_ranks(self) -> Array | None:
        """The ranks that `set_lora_batch_info` took, on the device; None when unset."""
        return None if self.batch_info is None else self.batch_info.lora_ranks

    @property
    def lora_grouped_offsets(self) -> Array | None:
        """The offsets that `set_lora_batch_info` took, on the device; None when unset."""
        return None if self.batch_info is None else self.batch_info.lora_grouped_offsets

    def _rank_major_b(self) -> Array:
        """Zeros of the shape of B, ranks apart in memory: an adapter's cost follows its true rank."""
        shape = (self.max_num_loras, self.max_lora_rank, self.out_dim)
        return zeros(shape, self.dtype.to_numpy(), self.device).transpose(0, 2, 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """An unpickled layer: pickling lost the layout of B."""
        vars(self).update(state)
        if self.lora_B.strides[1] != self.lora_B.dtype.itemsize:
            values, self.lora_B = self.lora_B, self._rank_major_b()
            copy_into(self.lora_B, values)

    # ---- Slots ----------------------------------------------------------------------------------

    def set_adapter(
        self,
        slot: int,
        lora_A: Array,
        lora_B: Array,
        *,
        scaling: float = 1.0,
        lora_bias: Array | None = None,
    ) -> None:
        """Put an adapter into a slot; the rest of the slot is zeroed.

        ``scaling * lora_B`` is computed in float32; both matrices are rounded once to the layer's
        dtype. On a GPU the copies run on the current stream, so after earlier work there that uses
        the slot.

        Args:
            slot: In ``[0, max_num_loras)``.
            lora_A: ``[rank, in_dim]``, rank at most ``max_lora_rank``, from any device, in the
                layer's dtype or float32.
            lora_B: ``[out_dim, rank]``, likewise.
            scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
            lora_bias: ``[out_dim]``, with ``has_lora_bias`` only; None: zeros. Not scaled.

        Raises:
            ValueError, TypeError: An argument does not fit; the slot is left as it was.
        """
        slot = self._slot(slot)
        a, b = self._factors(lora_A, lora_B)
        if not math.isfinite(checks.check_number(scaling, "scaling")):
            raise ValueError(f"scaling must be finite, got {scaling}")
        bias = self._slot_bias(lora_bias)

        rank, dtype = a.shape[0], self.dtype.to_numpy()
        # Copies before anything is cleared: the arguments may be views of this slot.
        a, b = rounded(a, dtype), rounded(b, dtype, scaling)
        bias = None if bias is None else rounded(bias, dtype)
        self.clear_adapter(slot)
        copy_into(self.lora_A[slot, :rank], a)
        copy_into(self.lora_B[slot, :, :rank], b)
        if bias is not None and self.lora_bias is not None:
            copy_into(self.lora_bias[slot], bias)
        fill(self.slot_ranks[slot : slot + 1], rank)

    def clear_adapter(self, slot: int) -> None:
        """Zero a slot and set it back to full rank, as it was at construction."""
        slot = self._slot(slot)
        fill(self.lora_A[slot], 0)
        fill(self.lora_B[slot], 0)
        if self.lora_bias is not None:
            fill(self.lora_bias[slot], 0)
        fill(self.slot_ranks[slot : slot + 1], self.max_lora_rank)

    def set_slot_rank(self, slot: int, rank: int) -> None:
        """Let the first `rank` rows of A and columns of B count, in ``[0, max_lora_rank]``."""
        slot, rank = self._slot(slot), integer(rank, "rank")
        if not 0 <= rank <= self.max_lora_rank:
            raise ValueError(
                f"rank must be in [0, max_lora_rank = {self.max_lora_rank}], got {rank}"
            )
        fill(self.slot_ranks[slot : slot + 1], rank)

    # ---- Checks ---------------------------------------------------------------------------------

    def _slot(self, slot: int) -> int:
        slot = integer(slot, "slot")
        if not 0 <= slot < self.max_num_loras:
            raise ValueError(
                f"slot must be in [0, max_num_loras = {self.max_num_loras}), got {slot}"
            )
        return slot

    def _factors(self, lora_A: Array, lora_B: Array) -> tuple[Array, Array]:
        a, b = as_any_array(lora_A, "lora_A"), as_any_array(lora_B, "lora_B")
        sizes = checks.check_shapes(
            lora_A=(a, f"rank {self.in_dim}"), lora_B=(b, f"{self.out_dim} rank")
        )
        if sizes["rank"] > self.max_lora_rank:
            raise ValueError(
                f"lora_A must have at most max_lora_rank = {self.max_lora_rank} rows, "
                f"got {sizes['rank']}"
            )
        checks.check_dtype(self._adapter_dtypes(), lora_A=a, lora_B=b)
        return a, b

    def _slot_bias(self, lora_bias: Array | None) -> Array | None:
        if lora_bias is None:
            return None
        if self.lora_bias is None:
            raise ValueError("lora_bias must be None, as the layer was made without has_lora_bias")
        bias = as_any_array(lora_bias, "lora_bias")
        checks.check_shapes(lora_bias=(bias, f"{self.out_dim}"))
        checks.check_dtype(self._adapter_dtypes(), lora_bias=bias)
        return bias

    def _adapter_dtypes(self) -> set[np.dtype[Any]]:
        return {self.dtype.to_numpy(), STORAGE[0]}

    def _reset_slot_ranks(self) -> None:
        fill(self.slot_ranks, self.max_lora_rank)
