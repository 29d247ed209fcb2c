"""One decoder block from lorakit's layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lorakit import jit
from lorakit.demo.weights import BlockWeights, projections
from lorakit.nn import (
    AttentionWithRopeAndLoRA,
    DeviceRef,
    DType,
    KVCacheParams,
    LinearLoRA,
    LoRABatch,
    PagedKVCacheCollection,
    RotaryEmbedding,
)

THETA = 500000.0  # of Llama 3


class Activations(NamedTuple):
    """What a call of the block computed, each ``[total_tokens, ...]`` in the block's dtype."""

    attention_in: Any
    attention_out: Any
    mlp_in: Any
    gate: Any
    up: Any
    activated: Any
    down: Any
    y: Any


class DecoderBlock:
    """A Llama block with an adapter for each group of rows, RMS norms without weights::

        h = x + attention(norm(x))
        y = h + down(silu(gate(norm(h))) * up(norm(h)))

    Args:
        weights: On the host; copied.
        device: Where the block runs.
        page_size: Tokens in a page of the cache.
        max_seq_len: Longest sequence.
    """

    def __init__(
        self, weights: BlockWeights, device: DeviceRef, page_size: int, max_seq_len: int
    ) -> None:
        shape, dtype = weights.shape, DType.from_numpy(weights.dtype)
        self.device = device
        self.kv_params = KVCacheParams(dtype, shape.n_kv_heads, shape.head_dim, page_size=page_size)
        self.rope = RotaryEmbedding(
            shape.hidden_size,
            shape.n_heads,
            THETA,
            max_seq_len,
            device,
            head_dim=shape.head_dim,
            interleaved=False,
        )
        slots, rank = len(weights.adapters), weights.max_rank
        self.attention = AttentionWithRopeAndLoRA(
            rope=self.rope,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            hidden_size=shape.hidden_size,
            kv_params=self.kv_params,
            devices=[device],
            dtype=dtype,
            max_num_loras=slots,
            max_lora_rank=rank,
        )
        self.mlp = {
            name: LinearLoRA(*projections(shape)[name], slots, rank, dtype, device)
            for name in ("gate", "up", "down")
        }
        self._load(weights)

    def set_lora_batch(self, batch: LoRABatch) -> None:
        """Which adapter each group of rows uses from now on."""
        self.attention.set_lora_batch_info(*batch)
        for linear in self.mlp.values():
            linear.set_lora_batch_info(*batch)

    def __call__(self, x: Any, kv: PagedKVCacheCollection, input_row_offsets: Any) -> Activations:
        """Run a step. Running it again with the same arguments stores the same keys and values."""
        attention_in = _norm(x)
        attended = self.attention(0, attention_in, kv, self.rope.freqs_cis, input_row_offsets)
        h = _sum(x, attended)
        mlp_in = _norm(h)
        gate, up = self.mlp["gate"](mlp_in), self.mlp["up"](mlp_in)
        activated = _silu_times(gate, up)
        down = self.mlp["down"](activated)
        return Activations(attention_in, attended, mlp_in, gate, up, activated, down, _sum(h, down))

    def _load(self, weights: BlockWeights) -> None:
        attention = {name: getattr(self.attention, f"{name}_proj") for name in ("q", "k", "v", "o")}
        for name, linear in {**attention, **self.mlp}.items():
            linear.load_state_dict({"weight": weights.base[name]})
            for slot, adapter in enumerate(weights.adapters):
                linear.set_adapter(slot, adapter.a[name], adapter.b[name], scaling=adapter.scaling)


# Elementwise parts, in float32 and rounded once.


def _norm(x: Any) -> Any:
    xp, wide = _library(x), x.astype(np.float32)
    size = xp.sqrt(xp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide / size).astype(x.dtype)


def _sum(a: Any, b: Any) -> Any:
    return (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype)


def _silu_times(gate: Any, up: Any) -> Any:
    wide = gate.astype(np.float32)
    silu = wide / (1.0 + _library(gate).exp(-wide))
    return (silu * up.astype(np.float32)).astype(gate.dtype)


def _library(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jit.import_cupy()
