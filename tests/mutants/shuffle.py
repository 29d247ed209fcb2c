"""A pytest plugin: the tests in a mixed order, always the same, so that one that fails comes soon."""

from __future__ import annotations

import random

import pytest

# What takes long, because it compiles many instances, comes last.
_SLOW = ("test_sgmv_qkv.py", "test_large_addresses.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    random.Random(0).shuffle(items)
    items.sort(key=lambda item: item.path.name in _SLOW)
