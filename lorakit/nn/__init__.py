"""Layers: they hold sizes and arrays, and call `lorakit.ops`."""

from lorakit.nn.attention import AttentionWithRope
from lorakit.nn.attention_lora import AttentionWithRopeAndLoRA
from lorakit.nn.device import DeviceKind, DeviceRef
from lorakit.nn.dtype import DType
from lorakit.nn.interfaces import SupportsLoRA
from lorakit.nn.kv_cache import (
    KVCacheParams,
    KVCacheStrategy,
    PagedKVCacheCollection,
    PagedKVCacheLayers,
)
from lorakit.nn.kv_manager import OutOfPagesError, PagedKVCacheManager
from lorakit.nn.linear import Linear
from lorakit.nn.linear_lora import LinearLoRA
from lorakit.nn.lora_batch import LoRABatch, build_lora_batch, sort_lora_batch
from lorakit.nn.module import Module
from lorakit.nn.rotary_embedding import DynamicRotaryEmbedding, RotaryEmbedding
from lorakit.nn.rotary_scaling import (
    LinearRotaryEmbedding,
    LinearScalingParams,
    Llama3RopeScalingParams,
    Llama3RotaryEmbedding,
    YarnRotaryEmbedding,
    YarnScalingParams,
)

__all__ = [
    "AttentionWithRope",
    "AttentionWithRopeAndLoRA",
    "DType",
    "DeviceKind",
    "DeviceRef",
    "DynamicRotaryEmbedding",
    "KVCacheParams",
    "KVCacheStrategy",
    "Linear",
    "LinearLoRA",
    "LinearRotaryEmbedding",
    "LinearScalingParams",
    "Llama3RopeScalingParams",
    "Llama3RotaryEmbedding",
    "LoRABatch",
    "Module",
    "OutOfPagesError",
    "PagedKVCacheCollection",
    "PagedKVCacheLayers",
    "PagedKVCacheManager",
    "RotaryEmbedding",
    "SupportsLoRA",
    "YarnRotaryEmbedding",
    "YarnScalingParams",
    "build_lora_batch",
    "sort_lora_batch",
]
