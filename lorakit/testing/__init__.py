"""What tests, benchmarks and the demonstration share: seeded inputs, and how much error is allowed.

Not needed to use lorakit. Everything here is NumPy; inputs are built on the host and copied.
"""

from lorakit.testing.batches import LoraBatch, lora_batch, row_offsets
from lorakit.testing.budget import (
    assert_bitwise_equal,
    assert_within_budget,
    count_bytes,
    sum_factor,
    to_host,
)
from lorakit.testing.derived import attention_error, rope_terms
from lorakit.testing.inputs import (
    Adapters,
    PagedCache,
    activations,
    adapters,
    paged_cache,
    rotary_table,
    widen,
)
from lorakit.testing.models import MODELS, ModelShape

__all__ = [
    "MODELS",
    "Adapters",
    "LoraBatch",
    "ModelShape",
    "PagedCache",
    "activations",
    "adapters",
    "assert_bitwise_equal",
    "assert_within_budget",
    "attention_error",
    "count_bytes",
    "lora_batch",
    "paged_cache",
    "rope_terms",
    "rotary_table",
    "row_offsets",
    "sum_factor",
    "to_host",
    "widen",
]
