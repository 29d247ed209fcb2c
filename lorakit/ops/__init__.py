"""The operations on arrays: CUDA kernels on CuPy arrays, the references on NumPy arrays.

Every op checks what the host can see before it writes anything, allocates its result, and launches on
CuPy's current stream. None reads device memory, so each can be captured in a CUDA graph.
"""

from lorakit.ops.attention import attention_ragged
from lorakit.ops.kv_cache import add_kv, store_kv
from lorakit.ops.linear import linear
from lorakit.ops.rope import rope_ragged, rope_store_kv
from lorakit.ops.sgmv import (
    sgmv_expand,
    sgmv_lora,
    sgmv_lora_slices,
    sgmv_qkv_lora,
    sgmv_shrink,
)
from lorakit.ops.sgmv_route import LoRARoute, sgmv_route

__all__ = [
    "LoRARoute",
    "add_kv",
    "attention_ragged",
    "linear",
    "rope_ragged",
    "rope_store_kv",
    "sgmv_expand",
    "sgmv_lora",
    "sgmv_lora_slices",
    "sgmv_qkv_lora",
    "sgmv_route",
    "sgmv_shrink",
    "store_kv",
]
