"""Five classic mistakes, planted into each kernel that can make them: a kernel test must fail.

A few of the mutants that ``python -m tests.mutants`` makes, each against one or two small tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.mutants.runner import Stage, Workshop
from tests.mutants.sites import Mutant, all_mutants

SHRINK = "tests/ops/test_sgmv.py::test_shrink[tile_plus_one-float16]"
EXPAND = "tests/ops/test_sgmv.py::test_expand[rank_100-float16]"
SHRINK_LONG = "tests/ops/test_sgmv.py::test_shrink[three_parts-bfloat16]"
LONG = "tests/ops/test_invariance.py::test_tiles_of_every_size[3080-False-float16]"
SHRINK_TAIL = "tests/ops/test_sgmv.py::test_shrink[k200_n264-bfloat16]"
EXPAND_IN_PLACE = "tests/ops/test_sgmv.py::test_expand[y_wide-float16]"
ATTENTION = "tests/ops/test_attention.py::test_attention[mixed-float16]"
DECODE = "tests/ops/test_attention.py::test_attention[chunks_of_1_and_2-float16]"
ROPE = "tests/ops/test_rope.py::test_rope[decode-bfloat16]"
ROPE_STORE = "tests/ops/test_rope.py::test_rope_store[decode-bfloat16]"
STORE = "tests/ops/test_kv_cache.py::test_store[mixed-bfloat16]"
ADD = "tests/ops/test_kv_cache.py::test_add[mixed-bfloat16]"


@dataclass(frozen=True)
class Plant:
    """A mutant, named by what it changes in a line, and the test that sees it."""

    name: str
    path: str
    code: str
    change: str
    test: str
    nth: int = 0
    """Which of several equal lines."""
    schedule: str = "in_order"

    def mutant(self) -> Mutant:
        found = [
            mutant
            for mutant in all_mutants()
            if mutant.path == self.path
            and self.code in mutant.code
            and f"{mutant.before} -> {mutant.after}" == self.change
        ]
        return found[self.nth]


def barrier(source: str, nth: int, test: str) -> Plant:
    code = "__syncthreads();"
    name = f"removed barrier {nth} of {source}"
    return Plant(name, source, code, "__syncthreads() -> ", test, nth, "lifo")


def wait(source: str, nth: int, test: str, pending: str = "1") -> Plant:
    wait = f"cp_async_wait<{pending}>()"
    return Plant(f"removed wait {nth} of {source}", source, f"{wait};", f"{wait} -> ", test, nth)


PLANTS = (
    *(barrier("sgmv_shrink.cu", nth, SHRINK_LONG) for nth in range(3)),
    *(barrier("sgmv_expand.cu", nth, EXPAND) for nth in (1, 3)),
    barrier("sgmv_shrink_long.cu", 1, LONG),
    barrier("sgmv_expand_long.cu", 3, LONG),
    wait("sgmv_shrink_long.cu", 0, LONG, "kStages - 2"),
    wait("sgmv_expand_long.cu", 0, LONG, "kRing - 1"),
    Plant(
        "warps that share B do not meet",
        "sgmv_expand_long.cu",
        "named_barrier(",
        "named_barrier(1 + column_warp, kRowWarps * kWarpSize) -> ",
        LONG,
        schedule="random",
    ),
    *(barrier("attention.cu", nth, ATTENTION) for nth in range(2)),
    *(barrier("attention_decode.cu", nth, DECODE) for nth in range(5)),
    wait("attention_decode.cu", 0, DECODE),
    wait("sgmv_shrink.cu", 0, SHRINK, "kStages - 1"),
    wait("sgmv_expand.cu", 0, EXPAND, "kAhead - 1"),
    wait("attention.cu", 0, ATTENTION, "0"),
    Plant(
        "shrink past its group",
        "sgmv_shrink.cu",
        "if (8 * m + own_row < num_rows && own_r < block.h_cols)",
        "8 * m + own_row < num_rows && own_r < block.h_cols -> own_r < block.h_cols",
        SHRINK,
    ),
    Plant(
        "expand past its group",
        "sgmv_expand.cu",
        "if (i * kYRows + y_row < live_rows)",
        "i * kYRows + y_row < live_rows -> true",
        EXPAND_IN_PLACE,
        nth=1,
    ),
    Plant(
        "attention past its sequence",
        "attention.cu",
        "if (m >= share.num_rows)",
        ">= -> >",
        ATTENTION,
        schedule="lifo",
    ),
    *(
        Plant(
            f"{name} counts a row to the sequence before",
            "common/ragged.cuh",
            "start(middle) <= value",
            "<= -> <",
            test,
        )
        for name, test in (("rope", ROPE), ("store", STORE), ("add", ADD))
    ),
    Plant(
        "rope_store counts a row to the sequence before",
        "rope_store.cu",
        "winner = __popc(",
        "<= -> <",
        ROPE_STORE,
    ),
    Plant(
        "a page's tail, loaded",
        "attention.cu",
        "key < share.num_keys",
        "key >= share.begin_key && key < share.num_keys -> key >= share.begin_key",
        ATTENTION,
    ),
    Plant(
        "a key after its token, scored",
        "attention.cu",
        "first_key + kBlockN > share.all_end",
        "first_key < share.all_begin || first_key + kBlockN > share.all_end -> first_key < share.all_begin",
        ATTENTION,
    ),
    Plant("a NaN of the next slot", "attention.cu", "key < share.num_keys", "< -> <=", ATTENTION),
)
# Rows, columns and keys that are not there are zeros in shared memory; here they are whatever it held.
PLANTS += (
    Plant(
        "a NaN of what is not there, shrink",
        "common/sgmv.cuh",
        "cp_async_16(to, from, count",
        "count > 0 -> true",
        SHRINK_TAIL,
    ),
    Plant(
        "a NaN of what is not there, attention",
        "attention.cu",
        "cp_async_16(to.at(",
        "live -> true",
        ATTENTION,
    ),
)


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ for the emulator")
    with Workshop() as workshop:
        yield workshop


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_plant_is_found(plant: Plant, workshop: Workshop) -> None:
    stage = Stage(plant.schedule, plant.schedule, tests=(plant.test,))
    killer = workshop.judge(plant.mutant(), [stage]).killed_by
    assert plant.test in killer


def test_without_a_plant_they_pass(workshop: Workshop) -> None:
    """In both orders: so it is the plant that fails."""
    tests = sorted({plant.test for plant in PLANTS})
    for schedule in ("in_order", "lifo"):
        assert workshop.run(Stage(schedule, schedule), tests) == ""
