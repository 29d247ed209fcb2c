"""The public names, their documented signatures, and what importing costs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import lorakit
from lorakit import DType

EMPTY = inspect.Parameter.empty

# name -> default, in the documented order.
LINEAR = {
    "in_dim": EMPTY,
    "out_dim": EMPTY,
    "dtype": EMPTY,
    "device": EMPTY,
    "has_bias": False,
    "quantization_encoding": None,
    "float8_config": None,
    "name": None,
    "clip_weight": None,
}
LINEAR_LORA = {
    "in_dim": EMPTY,
    "out_dim": EMPTY,
    "max_num_loras": EMPTY,
    "max_lora_rank": EMPTY,
    "dtype": EMPTY,
    "device": EMPTY,
    "has_bias": False,
    "has_lora_bias": False,
    "name": None,
    "quantization_encoding": None,
    "float8_config": None,
}
ATTENTION = {
    "rope": EMPTY,
    "num_attention_heads": EMPTY,
    "num_key_value_heads": EMPTY,
    "hidden_size": EMPTY,
    "kv_params": EMPTY,
    "devices": None,
    "dtype": DType.float32,
    "linear_cls": lorakit.Linear,
    "stacked_qkv": False,
    "scale": None,
    "has_bias": False,
    "float8_config": None,
    "clip_qkv": None,
}
ROPE = {
    "dim": EMPTY,
    "n_heads": EMPTY,
    "theta": EMPTY,
    "max_seq_len": EMPTY,
    "device": EMPTY,
    "head_dim": None,
    "_freqs_cis": None,
    "interleaved": True,
}
INFO = {"lora_ids": EMPTY, "lora_ranks": EMPTY, "lora_grouped_offsets": EMPTY}
SCALED_ROPE = ROPE | {"scaling_params": None}

DOCUMENTED = [
    (lorakit.Linear, LINEAR),
    (lorakit.LinearLoRA, LINEAR_LORA),
    (lorakit.AttentionWithRope, ATTENTION),
    (lorakit.AttentionWithRopeAndLoRA, ATTENTION | {"linear_cls": lorakit.LinearLoRA}),
    (lorakit.RotaryEmbedding, ROPE),
    (lorakit.Llama3RotaryEmbedding, SCALED_ROPE),
    (lorakit.YarnRotaryEmbedding, SCALED_ROPE),
    (lorakit.LinearRotaryEmbedding, SCALED_ROPE),
    (lorakit.LinearLoRA.set_lora_batch_info, INFO),
    (lorakit.SupportsLoRA.set_lora_batch_info, INFO),
    (lorakit.LinearLoRA.apply_lora, {"x": EMPTY}),
    (lorakit.SupportsLoRA.apply_lora, {"x": EMPTY}),
    (
        lorakit.AttentionWithRopeAndLoRA.fused_qkv_lora,
        {"x": EMPTY, "kv_collection": EMPTY, "input_row_offsets": EMPTY, "layer_idx": EMPTY},
    ),
    (
        lorakit.AttentionWithRopeAndLoRA.__call__,
        {
            "layer_idx": EMPTY,
            "x": EMPTY,
            "kv_collection": EMPTY,
            "freqs_cis": EMPTY,
            "input_row_offsets": EMPTY,
        },
    ),
    (
        lorakit.KVCacheParams,
        {
            "dtype": EMPTY,
            "n_kv_heads": EMPTY,
            "head_dim": EMPTY,
            "enable_prefix_caching": False,
            "enable_kvcache_swapping_to_host": False,
            "host_kvcache_swap_space_gb": None,
            "cache_strategy": lorakit.KVCacheStrategy.PAGED,
            "page_size": None,
            "n_devices": 1,
            "data_parallel_degree": 1,
        },
    ),
    (
        lorakit.PagedKVCacheManager,
        {
            "params": EMPTY,
            "max_batch_size": EMPTY,
            "max_seq_len": EMPTY,
            "num_layers": EMPTY,
            "devices": EMPTY,
            "cache_memory": EMPTY,
            "page_size": 128,
            "enable_runtime_checks": False,
        },
    ),
    (
        lorakit.PagedKVCacheCollection,
        {"blocks": EMPTY, "cache_lengths": EMPTY, "lookup_table": EMPTY, "max_lengths": EMPTY},
    ),
    (lorakit.DeviceRef, {"device_type": EMPTY, "id": 0}),
    (
        lorakit.Llama3RopeScalingParams,
        {
            "factor": EMPTY,
            "low_freq_factor": EMPTY,
            "high_freq_factor": EMPTY,
            "orig_max_position": EMPTY,
        },
    ),
    (
        lorakit.YarnScalingParams,
        {
            "factor": EMPTY,
            "beta_fast": EMPTY,
            "beta_slow": EMPTY,
            "original_max_position_embeddings": EMPTY,
            "truncate": EMPTY,
        },
    ),
]


@pytest.mark.parametrize(
    ("call", "documented"), DOCUMENTED, ids=lambda p: getattr(p, "__qualname__", "")
)
def test_signatures(call: Any, documented: dict[str, Any]) -> None:
    """Documented arguments come first, as documented; any other is keyword-only with a default."""
    parameters = dict(inspect.signature(call).parameters)
    parameters.pop("self", None)
    names = list(parameters)
    assert names[: len(documented)] == list(documented)
    assert {name: parameters[name].default for name in documented} == documented
    for name in names[len(documented) :]:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is not EMPTY


def test_attention_takes_keywords_only() -> None:
    for cls in (lorakit.AttentionWithRope, lorakit.AttentionWithRopeAndLoRA):
        for parameter in inspect.signature(cls).parameters.values():
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


def test_all_names_exist_and_nn_is_part_of_them() -> None:
    assert sorted(set(lorakit.__all__)) == sorted(lorakit.__all__)
    for name in lorakit.__all__:
        assert getattr(lorakit, name) is not None
    assert set(lorakit.nn.__all__) < set(lorakit.__all__)
    for name in lorakit.nn.__all__:
        assert getattr(lorakit.nn, name) is getattr(lorakit, name)
