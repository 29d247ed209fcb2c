"""lorakit: layers and GPU kernels for serving many LoRA adapters at once, on CuPy alone.

The layers follow the documented API of MAX (`max.nn.lora`). On a CPU they hold NumPy arrays and run
the references; on a GPU they hold CuPy arrays and run the kernels. Importing lorakit imports no
CuPy.

    nn          layers (also here), their cache, rotary tables and batch metadata
    ops         the operations on arrays that layers are made of
    reference   what each operation means, in NumPy
"""

from lorakit import nn, ops
from lorakit.errors import DeviceValueError, check_errors
from lorakit.graph import Graph
from lorakit.nn import (
    AttentionWithRope,
    AttentionWithRopeAndLoRA,
    DeviceKind,
    DeviceRef,
    DType,
    DynamicRotaryEmbedding,
    KVCacheParams,
    KVCacheStrategy,
    Linear,
    LinearLoRA,
    LinearRotaryEmbedding,
    LinearScalingParams,
    Llama3RopeScalingParams,
    Llama3RotaryEmbedding,
    LoRABatch,
    Module,
    OutOfPagesError,
    PagedKVCacheCollection,
    PagedKVCacheLayers,
    PagedKVCacheManager,
    RotaryEmbedding,
    SupportsLoRA,
    YarnRotaryEmbedding,
    YarnScalingParams,
    build_lora_batch,
    sort_lora_batch,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionWithRope",
    "AttentionWithRopeAndLoRA",
    "DType",
    "DeviceKind",
    "DeviceRef",
    "DeviceValueError",
    "DynamicRotaryEmbedding",
    "Graph",
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
    "__version__",
    "build_lora_batch",
    "check_errors",
    "nn",
    "ops",
    "sort_lora_batch",
]
