"""Self-attention whose four projections carry LoRA adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lorakit import checks, ops
from lorakit.nn.arrays import Array, HostInteger, positive
from lorakit.nn.attention import AttentionWithRope
from lorakit.nn.attention_step import AttentionStep
from lorakit.nn.batch_info import BatchInfo
from lorakit.nn.device import DeviceRef
from lorakit.nn.dtype import DType
from lorakit.nn.kv_cache import KVCacheParams, KVCollection
from lorakit.nn.linear import Linear
from lorakit.nn.linear_lora import LinearLoRA
from lorakit.nn.rotary_embedding import RotaryEmbedding


class AttentionWithRopeAndLoRA(AttentionWithRope):
    """`AttentionWithRope` with an adapter for each group of rows (MAX `AttentionWithRopeAndLoRA`).

    The deltas of q, k and v are added before rotation, so that the cache holds adapted keys and
    values; the delta of ``o_proj`` is added to its result. Without batch info it is the base layer.

    Args:
        linear_cls: As in `AttentionWithRope`. Where it takes ``max_num_loras`` and
            ``max_lora_rank`` and has no values for them, as the default `LinearLoRA`, it gets those
            below; a `functools.partial` that sets them wins.
        max_num_loras: Adapter slots of each projection.
        max_lora_rank: Rank each slot is stored at.
        rope, num_attention_heads, num_key_value_heads, hidden_size, kv_params, devices, dtype,
            stacked_qkv, scale, has_bias, float8_config, clip_qkv, window, soft_cap, sinks: As in
            `AttentionWithRope`. With `stacked_qkv` the adapters keep their names
            ``q_proj.lora_A.weight`` and so on.
    """

    # With another `linear_cls` they are what it makes; then `qkv_loras` raises.
    q_proj: LinearLoRA
    k_proj: LinearLoRA
    v_proj: LinearLoRA
    o_proj: LinearLoRA

    def __init__(
        self,
        *,
        rope: RotaryEmbedding,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        kv_params: KVCacheParams,
        devices: Sequence[DeviceRef] | None = None,
        dtype: DType = DType.float32,
        linear_cls: Callable[..., Linear] = LinearLoRA,
        stacked_qkv: bool = False,
        scale: float | None = None,
        has_bias: bool = False,
        float8_config: Any = None,
        clip_qkv: float | None = None,
        max_num_loras: int = 8,
        max_lora_rank: int = 16,
        window: tuple[int | None, int | None] | None = None,
        soft_cap: float | None = None,
        sinks: Array | None = None,
    ) -> None:
        positive(max_num_loras=max_num_loras, max_lora_rank=max_lora_rank)
        super().__init__(
            rope=rope,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_size=hidden_size,
            kv_params=kv_params,
            devices=devices,
            dtype=dtype,
            linear_cls=_with_defaults(
                linear_cls, max_num_loras=max_num_loras, max_lora_rank=max_lora_rank
            ),
            stacked_qkv=stacked_qkv,
            scale=scale,
            has_bias=has_bias,
            float8_config=float8_config,
            clip_qkv=clip_qkv,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
        )

    @property
    def qkv_loras(self) -> list[LinearLoRA]:
        """``[q_proj, k_proj, v_proj]``; `ValueError` if one is not a `LinearLoRA`."""
        loras = []
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(self, name)
            if not isinstance(projection, LinearLoRA):
                raise ValueError(f"{name} must be a LinearLoRA, got {type(projection).__name__}")
            loras.append(projection)
        return loras

    def set_lora_batch_info(
        self,
        lora_ids: Array,
        lora_ranks: Array,
        lora_grouped_offsets: Array,
        *,
        route: ops.LoRARoute | None = None,
    ) -> None:
        """`LinearLoRA.set_lora_batch_info` on all four projections; host arrays are copied once.

        Not in MAX, where it is set on each projection. All four are set, or none.

        Raises:
            ValueError, TypeError: As `LinearLoRA.set_lora_batch_info`, or a projection is no
                LinearLoRA.
        """
        if not isinstance(self.o_proj, LinearLoRA):
            raise ValueError(f"o_proj must be a LinearLoRA, got {type(self.o_proj).__name__}")
        loras = [*self.qkv_loras, self.o_proj]
        info = BatchInfo.checked(
            lora_ids,
            lora_ranks,
            lora_grouped_offsets,
            self.devices[0],
            min(lora.max_num_loras for lora in loras),
            route,
        )
        for lora in loras:
            lora.batch_info = info

    def fused_qkv_lora(
        self,
        x: Array,
        kv_collection: KVCollection,
        input_row_offsets: Array,
        layer_idx: HostInteger,
    ) -> Array:
        """The adapters' part of q, k, v alone: returns q's, adds k's and v's into the cache.

        They are added at the positions of this step, before rotation, where the base keys and
        values must be already; calling it twice adds them twice. The batch info of ``q_proj``
        counts for all three. Arguments as in `AttentionWithRope.__call__`.

        Returns:
            The query delta alone, ``[total_tokens, Q]``, in the dtype of `x`.

        Raises:
            ValueError: ``q_proj`` has no batch info, a projection is no `LinearLoRA`, or as in
                `AttentionWithRope.__call__`.
        """
        loras = self.qkv_loras
        info = loras[0].batch_info
        if info is None:
            raise ValueError("set_lora_batch_info must be called on q_proj before fused_qkv_lora")
        step = AttentionStep.checked(self, layer_idx, x, kv_collection, input_row_offsets)
        info.check_rows(step.x, min(lora.max_num_loras for lora in loras))
        biases = tuple(lora.lora_bias for lora in loras)
        return ops.sgmv_qkv_lora(
            step.x,
            tuple(lora.lora_A for lora in loras),
            tuple(lora.lora_B for lora in loras),
            info.lora_ids,
            info.lora_ranks,
            info.lora_grouped_offsets,
            step.input_row_offsets,
            step.kv,
            step.layer_idx,
            slot_ranks=tuple(lora.slot_ranks for lora in loras),
            bias=None if all(bias is None for bias in biases) else biases,
            route=info.route,
        )

    def _check_adapters(self, step: AttentionStep) -> None:
        if (info := self._qkv_info()) is not None:
            info.check_rows(step.x, min(lora.max_num_loras for lora in self.qkv_loras))
        if isinstance(self.o_proj, LinearLoRA) and self.o_proj.batch_info is not None:
            self.o_proj.batch_info.check_rows(step.x, self.o_proj.max_num_loras)

    def _check_output(self) -> None:
        super()._check_output()
        if isinstance(lora := self.o_proj, LinearLoRA):
            factors = {"o_proj.lora_A": lora.lora_A, "o_proj.lora_B": lora.lora_B}
            slots, rank = lora.max_num_loras, "max_lora_rank"
            axes = (f"{slots} {rank} {self.q_weight_dim}", f"{slots} {self.hidden_size} {rank}")
            named = zip(factors, zip(factors.values(), axes, strict=True), strict=True)
            checks.check_shapes(**dict(named))
            checks.check_dtype((self.dtype.to_numpy(),), **factors)

    def _add_adapters(self, step: AttentionStep, qkv: Array) -> None:
        if (info := self._qkv_info()) is not None:
            loras = self.qkv_loras
            ops.sgmv_lora_slices(
                step.x,
                [lora.lora_A for lora in loras],
                [lora.lora_B for lora in loras],
                info.lora_ids,
                info.lora_ranks,
                info.lora_grouped_offsets,
                slot_ranks=[lora.slot_ranks for lora in loras],
                bias=[lora.lora_bias for lora in loras],
                add_to=[qkv[:, columns] for columns in self._columns],
                route=info.route,
            )

    def _qkv_info(self) -> BatchInfo | None:
        """The batch info that counts for q, k, v; None when none of them has any."""
        infos = [getattr(projection, "batch_info", None) for projection in self._projections()]
        if infos[0] is None and any(info is not None for info in infos):
            raise ValueError(
                "set_lora_batch_info must be called on q_proj, whose info counts for q, k, v"
            )
        return infos[0]


def _with_defaults(linear_cls: Callable[..., Linear], **defaults: int) -> Callable[..., Linear]:
    """`linear_cls` with those of `defaults` that it takes and has no value for."""
    parameters = inspect.signature(linear_cls).parameters
    missing = {
        name: value
        for name, value in defaults.items()
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    }
    return partial(linear_cls, **missing)
