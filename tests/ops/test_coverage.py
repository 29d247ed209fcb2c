"""The cases of this folder run every kernel instance, and the marked ones under compute-sanitizer too.

Each test compares what it launched with what its case says, so the cases can be counted without a GPU.
"""

from __future__ import annotations

from lorakit import tiles
from tests.ops import test_attention, test_kv_cache, test_rope, test_sgmv, test_sgmv_qkv
from tests.ops.helpers import SANITIZED

MODULES = (test_attention, test_kv_cache, test_rope, test_sgmv, test_sgmv_qkv)


def test_the_cases_run_every_instance() -> None:
    assert len(MODULES) == 5  # importing them has filled the set
    names = {instance.name for instance in tiles.instances()}
    assert {instance.name for instance in SANITIZED} == names
    assert set(tiles.instances()) == SANITIZED


def test_cases_have_names_of_their_own() -> None:
    for module in MODULES:
        names = [case.name for case in module.CASES]
        assert len(names) == len(set(names)) <= 64
