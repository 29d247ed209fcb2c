"""References: what every op of lorakit means, in the shortest NumPy that a reader believes.

A reference has the name, the argument order and the shapes of its op, loops over groups, sequences
and tokens, and checks nothing: the op did. It is what the op runs on NumPy arrays and what the
kernels are tested against.

Numbers: sums and products are taken in float64 (in ``linear`` and ``add_kv`` in float32) and the
result is rounded once, to the dtype of the storage it goes to. With float64 arrays in place of the
stored ones nothing is rounded at all, which gives the exact answer that error budgets are measured
from.
"""

from lorakit.reference.attention import attention_ragged
from lorakit.reference.kv_cache import KVCache, add_kv, store_kv
from lorakit.reference.linear import linear
from lorakit.reference.rope import rope_ragged, rope_store_kv
from lorakit.reference.sgmv import (
    sgmv_expand,
    sgmv_lora,
    sgmv_lora_slices,
    sgmv_qkv_lora,
    sgmv_shrink,
)

__all__ = [
    "KVCache",
    "add_kv",
    "attention_ragged",
    "linear",
    "rope_ragged",
    "rope_store_kv",
    "sgmv_expand",
    "sgmv_lora",
    "sgmv_lora_slices",
    "sgmv_qkv_lora",
    "sgmv_shrink",
    "store_kv",
]
