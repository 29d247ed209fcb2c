"""sgmv_shrink, sgmv_expand and sgmv_lora: agreement with the references, edges, layouts, ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorakit import ops, reference, tiles
from lorakit.dtypes import bfloat16
from lorakit.testing import (
    activations,
    adapters,
    assert_bitwise_equal,
    assert_within_budget,
    widen,
)
from lorakit.tiles import Instance
from tests.ops.helpers import (
    FLOAT16,
    each_dtype,
    launches,
    parameters,
    skip_where_slow,
    split_error,
)
from tests.ops.sgmv_cases import CASES, SgmvCase, SgmvProblem

if TYPE_CHECKING:
    from tests.conftest import KernelDevice


@parameters(CASES, SgmvCase.shrink_instances)
def test_shrink(case: SgmvCase, kernels: KernelDevice, rng: np.random.Generator) -> None:
    skip_where_slow(case, kernels)
    problem = SgmvProblem(case, kernels, rng)
    with launches(kernels) as seen:
        h = ops.sgmv_shrink(
            kernels.asarray(problem.x),
            problem.device_a(),
            *problem.device_metadata,
            slot_ranks=problem.device_options["slot_ranks"],
        )
    assert seen == case.shrink_instances()
    exact, terms = (
        problem.expected(reference.sgmv_shrink, magnitude, problem.x, problem.a)
        for magnitude in (False, True)
    )
    assert_within_budget(h, exact, np.float32, terms, length=case.in_dim)
    assert_bitwise_equal(
        kernels.to_host(h)[problem.unread], np.zeros(problem.unread.sum(), np.float32)
    )


@parameters(CASES, SgmvCase.expand_instances)
def test_expand(case: SgmvCase, kernels: KernelDevice, rng: np.random.Generator) -> None:
    skip_where_slow(case, kernels)
    problem = SgmvProblem(case, kernels, rng)
    _check_expand(
        problem,
        case.expand_instances(kernels.backend.shared_bytes),
        lambda y: ops.sgmv_expand(
            kernels.asarray(problem.h),
            problem.device_b(),
            *problem.device_metadata,
            **problem.device_options,
            add_to=y,
        ),
        (case.rank + 2,),
        reference.sgmv_expand,
        problem.h,
        problem.b,
    )


@parameters(CASES, SgmvCase.lora_instances)
def test_lora(case: SgmvCase, kernels: KernelDevice, rng: np.random.Generator) -> None:
    skip_where_slow(case, kernels)
    problem = SgmvProblem(case, kernels, rng)
    _check_expand(
        problem,
        case.lora_instances(kernels.backend.shared_bytes),
        lambda y: ops.sgmv_lora(
            kernels.asarray(problem.x),
            problem.device_a(),
            problem.device_b(),
            *problem.device_metadata,
            **problem.device_options,
            add_to=y,
        ),
        (case.in_dim, case.rank + 2),
        reference.sgmv_lora,
        problem.x,
        problem.a,
        problem.b,
    )


def _check_expand(
    problem: SgmvProblem,
    instances: set[Any],
    run: Callable[[Any], Any],
    length: tuple[int, ...],
    op: Any,
    first: Any,
    *weights: Any,
) -> None:
    case, kernels = problem.case, problem.kernels
    whole, y = problem.device_y()
    before = None if whole is None else kernels.to_host(whole)
    with launches(kernels) as seen:
        result = run(y)
    assert seen == instances
    exact, terms = (problem.expected(op, magnitude, first, *weights) for magnitude in (False, True))
    assert_within_budget(
        result,
        exact,
        case.y_dtype,
        terms,
        length=length,
        propagated64=split_error(case.dtype) * terms,
    )

    # Base rows, and what lies around the result, bit for bit.
    if y is None:
        assert_bitwise_equal(
            kernels.to_host(result)[problem.base], np.zeros_like(problem.y[problem.base])
        )
        return
    assert result is y
    after = kernels.to_host(whole)
    margin = (whole.shape[1] - case.out_dim) // 2
    live = np.zeros(whole.shape, np.bool_)
    live[1:-1, margin : margin + case.out_dim] = ~problem.base[:, np.newaxis]
    assert before is not None
    assert_bitwise_equal(after[~live], before[~live], "what is no row of an adapter")


@pytest.mark.parametrize(
    ("item_rows", "rank", "asking"),
    [
        (8, 16, {"sgmv_expand.cu"}),
        (64, 16, {"sgmv_shrink_long.cu"}),
        (64, 24, {"sgmv_shrink_long.cu", "sgmv_expand_long.cu"}),
    ],
)
def test_grids_go_by_the_instance_that_is_launched(
    item_rows: int,
    rank: int,
    asking: set[str],
    kernels: KernelDevice,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """How many of its blocks are resident is asked where a grid depends on it, and of no other instance."""
    asked: set[Instance] = set()
    grids: dict[Instance, int] = {}
    launch = kernels.backend.launch

    def ask(instance: Instance) -> int:
        asked.add(instance)
        return 2

    def record(instance: Instance, grid: Any, args: Any) -> None:
        grids[instance] = math.prod(grid)
        launch(instance, grid, args)

    monkeypatch.setattr(tiles, "sgmv_item_rows", lambda *_: item_rows)
    monkeypatch.setattr(kernels.backend, "resident_blocks", ask)
    monkeypatch.setattr(kernels.backend, "launch", record)
    made = adapters(1, rank, 3080, 600, bfloat16, rng, ranks=[rank])
    ops.sgmv_lora(
        kernels.asarray(activations((5, 3080), bfloat16, rng)),
        kernels.asarray(made.lora_a),
        kernels.asarray(made.lora_b.transpose(0, 2, 1)).transpose(0, 2, 1),
        np.array([0], np.int32),
        None,
        np.array([0, 5], np.int32),
    )
    assert {instance.source for instance in asked} == asking
    assert asked <= set(grids)
    # Of three blocks of columns two stay; of four parts of in_dim a long shrink has two groups.
    for instance, blocks in grids.items():
        if "expand" in instance.source:
            assert blocks == (2 if instance in asked else 3)
        elif "shrink" in instance.source:
            assert blocks == (2 if instance in asked else 4)


@each_dtype
@pytest.mark.parametrize("magnitude", ["huge", "tiny", "mixed"])
def test_rank_vector_beyond_the_range_of_float16(
    magnitude: str, dtype: Any, kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """The rank vector stays float32 between shrink and expand: 65504 and 6e-8 are no limits for it."""
    rank, out_dim = 16, 24
    h = rng.uniform(1, 2, (5, rank)) * rng.choice([-1, 1], (5, rank))
    b = rng.uniform(1, 2, (1, rank, out_dim))
    h, b = {
        "huge": (h * 1e7, b * 2.0**-13),
        "tiny": (h * 1e-12, b * 2.0**13),
        "mixed": (h * 10.0 ** rng.integers(-6, 7, (5, 1)), b),
    }[magnitude]
    h = h.astype(np.float32)
    if magnitude == "tiny":  # float32 results, for what float16 cannot hold
        add_to = np.zeros((5, out_dim), np.float32)
    else:
        add_to = np.zeros((5, out_dim), np.float32 if magnitude == "mixed" else dtype)
    b = b.astype(dtype)
    y = ops.sgmv_expand(
        kernels.asarray(h),
        kernels.asarray(b).transpose(0, 2, 1),
        np.array([0], np.int32),
        None,
        np.array([0, 5], np.int32),
        add_to=kernels.asarray(add_to),
    )
    exact = widen(h) @ widen(b[0])
    assert np.abs(exact).min() > 0
    assert np.isfinite(exact).all()
    terms = np.abs(widen(h)) @ np.abs(widen(b[0]))
    assert_within_budget(
        y, exact, add_to.dtype, terms, length=rank, propagated64=split_error(dtype) * terms
    )


def test_shrink_passes_the_largest_float16_on(kernels: KernelDevice) -> None:
    """x and A at 1000 give a rank vector of 6.4e7, which B at 2**-12 brings back into float16."""
    x = np.full((2, 64), 1000, FLOAT16)
    a = np.full((1, 8, 64), 1000, FLOAT16)
    b = np.full((1, 40, 8), 2.0**-14, FLOAT16)
    y = ops.sgmv_lora(
        kernels.asarray(x),
        kernels.asarray(a),
        kernels.asarray(b),
        np.array([0], np.int32),
        None,
        np.array([0, 2], np.int32),
    )
    assert_bitwise_equal(y, np.full((2, 40), 64e6 * 8 * 2.0**-14, FLOAT16))


def test_what_is_not_finite_stays_in_its_row(
    kernels: KernelDevice, rng: np.random.Generator
) -> None:
    """A NaN or an infinity in a live row of x is in all of this row's result, and in no other's."""
    (case,) = (case for case in CASES if case.name == "tile_plus_one")
    for dtype in case.dtypes:
        problem = SgmvProblem(SgmvCase("", ((1, 17),), ranks=(16,) * 4, dtype=dtype), kernels, rng)
        arguments = (problem.device_a(), problem.device_b(), *problem.device_metadata)
        options = problem.device_options
        clean = kernels.to_host(ops.sgmv_lora(kernels.asarray(problem.x), *arguments, **options))
        problem.x[3, 5], problem.x[16, 7] = np.nan, np.inf
        dirty = kernels.to_host(ops.sgmv_lora(kernels.asarray(problem.x), *arguments, **options))
        others = np.setdiff1d(np.arange(17), [3, 16])
        assert np.isnan(dirty[3]).all()
        assert not np.isfinite(dirty[16]).any()
        assert_bitwise_equal(dirty[others], clean[others])


def test_rows_may_start_anywhere(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """`x` and `h` one element past a multiple of 16 bytes: the bits of aligned ones."""
    a, b = rng.standard_normal((2, 3, 16)), rng.standard_normal((2, 3, 8))
    groups = (np.array([1, 0], np.int32), None, np.array([0, 2, 5], np.uint32))
    lora_a = kernels.asarray(a.astype(bfloat16))
    lora_b = kernels.asarray(b.astype(bfloat16)).transpose(0, 2, 1)
    x = kernels.asarray(rng.standard_normal(5 * 16 + 1).astype(bfloat16))[1:].reshape(5, 16)
    h = kernels.asarray(rng.standard_normal(5 * 3 + 1).astype(np.float32))[1:].reshape(5, 3)
    assert_bitwise_equal(
        ops.sgmv_lora(x, lora_a, lora_b, *groups),
        ops.sgmv_lora(kernels.asarray(kernels.to_host(x)), lora_a, lora_b, *groups),
    )
    assert_bitwise_equal(
        ops.sgmv_expand(h, lora_b, *groups),
        ops.sgmv_expand(kernels.asarray(kernels.to_host(h)), lora_b, *groups),
    )


def test_an_unbounded_rank(kernels: KernelDevice, rng: np.random.Generator) -> None:
    """`lora_ranks` is an upper bound: the largest uint32 bounds nothing."""
    problem = SgmvProblem(
        SgmvCase("", ((1, 5),), ranks_from="slots", dtype=np.dtype(np.float32)), kernels, rng
    )
    results = [
        ops.sgmv_lora(
            kernels.asarray(problem.x),
            problem.device_a(),
            problem.device_b(),
            problem.device_metadata[0],
            ranks,
            problem.device_metadata[2],
            slot_ranks=problem.device_options["slot_ranks"],
        )
        for ranks in (None, kernels.asarray(np.array([2**32 - 1], np.uint32)))
    ]
    assert np.abs(kernels.to_host(results[0])).max() > 0.1
    assert_bitwise_equal(results[0], results[1])
