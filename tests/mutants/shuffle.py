"""A pytest plugin: the tests in an order in which one that fails comes soon.

A few that reach most of the code first, then all in a mixed order, always the same, and last what takes
long.
"""

from __future__ import annotations

import os
import random

import pytest

_FIRST = (
    "test_lora[rank_17-float16]",
    "test_attention[mixed-float16]",
    "test_rope[interleaved-float16]",
    "test_rope[last_24_halves-float16]",
    "test_store[prefill-float16]",
    "test_add[float32_delta-float16]",
    "test_attention[mixed-float32]",
    "test_lora[rank_17-float32]",
)
_LAST = ("test_sgmv_qkv.py", "test_large_addresses.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    random.Random(0).shuffle(items)
    items.sort(key=lambda item: (item.name not in _FIRST, item.path.name in _LAST))
    if os.environ.get("LORAKIT_MUTANTS_QUICK"):
        del items[sum(item.name in _FIRST for item in items) :]
