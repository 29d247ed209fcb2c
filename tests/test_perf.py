"""The sweeps run, check before they time, and count what they say they count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lorakit import DeviceRef
from lorakit.testing import MODELS
from perf import bench_attention, bench_attention_layer, bench_kv_cache, bench_rope, bench_sgmv
from perf.bench_attention import _work as attention_work
from perf.harness import Place, Work, random_array
from perf.inputs import (
    device_rows,
    one_sequence,
    random_cache,
    slots_of_rows,
)

ROOT = Path(__file__).parents[1]
SWEEPS = (bench_sgmv, bench_rope, bench_kv_cache, bench_attention, bench_attention_layer)


def sweep(path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m pytest perf` in a process of its own, on the CPU wherever this runs."""
    ours = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    return subprocess.run(
        [sys.executable, "-m", "pytest", path, "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**ours, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_sweeps_time_every_small_case_by_themselves(tmp_path: Path) -> None:
    done = sweep("perf", f"--benchmark-json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU: small sizes, the references against plain NumPy" in done.stdout

    results = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    groups = {result["group"] for result in results}
    assert {"sgmv_lora", "sgmv_route", "rope_ragged", "rope_store_kv"} <= groups
    assert {"write_kv", "attention_ragged", "attention_layer"} <= groups
    for result in results:
        info = result["extra_info"]
        assert result["stats"]["rounds"] == 30
        assert result["stats"]["median"] > 0
        assert info["baseline_us"] > 0
        assert info["bytes"] > 0 or "base" in result["param"]
        assert info["share_of_budget"] <= 1
        row = [line for line in done.stdout.splitlines() if f"  {result['param']}  " in line]
        assert len(row) >= 1, result["param"]


@pytest.mark.parametrize("module", SWEEPS, ids=lambda module: module.__name__)
def test_cases_have_names_of_their_own(module: ModuleType) -> None:
    for cases in (module.CPU, module.GPU):
        names = [str(case) for case in cases]
        assert 0 < len(names) == len(set(names)) <= 60


def test_a_wrong_result_is_not_timed(tmp_path: Path) -> None:
    plugin = tmp_path / "plant.py"
    plugin.write_text(
        "from lorakit import ops\n"
        "right = ops.sgmv_lora_slices\n"
        "def wrong(*given, **named):\n"
        "    for y in right(*given, **named):\n"
        "        y *= 1.01\n"
        "ops.sgmv_lora_slices = wrong\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = sweep("perf/bench_sgmv.py", "-k", "lora", "-p", "plant", PYTHONPATH=path)
    assert done.returncode == 1
    assert "beyond their budget" in done.stdout
    assert "floor/time" not in done.stdout


def test_floor() -> None:
    assert Work(4_500_000_000).floor == pytest.approx(1e-3)
    assert Work(0, 790_000_000_000).floor == pytest.approx(1e-3)
    assert Work(1, 1).floor == 2e-6
    assert Work(1, 790_000_000_000).is_bound_by_products


def test_bytes_and_operations_of_attention() -> None:
    """Two sequences: 2 new behind 3, and 1 new; 6 heads on 2 of 16 elements, float32."""
    case = bench_attention.Case("tiny", "by-hand", (2, 1), (3, 0), page_size=4)
    rng = np.random.default_rng(0)
    cache = random_cache(case.cached, case.new, case.page_size, 2, 16, np.float32, rng)
    q = np.zeros((3, 6, 16), np.float32)
    work = attention_work(case, MODELS["tiny"], cache, q)
    assert work.bytes == 4 * (2 * 3 * 6 * 16 + 6 * 2 * 2 * 16)  # q, out; 6 tokens of k and v
    assert work.flops == 4 * 16 * 6 * (4 + 5 + 1)  # pairs that are seen


def test_bytes_of_sgmv_leave_base_rows_and_unused_adapters_out() -> None:
    case = bench_sgmv.Case("tiny", "qkv", 8, 9, 4, "halfbase")
    given = bench_sgmv.Inputs(case, Place(DeviceRef.CPU()), np.random.default_rng(0))
    rows = 4  # half of 8, each with an adapter of its own
    in_dim, out_dims = 80, 96 + 32 + 32
    factors = rows * 4 * (3 * in_dim + out_dims)
    assert given.work.bytes == 4 * (rows * in_dim + 2 * rows * out_dims + factors)
    assert given.work.flops == 2 * factors


def test_bytes_of_sgmv_follow_the_ranks() -> None:
    case = bench_sgmv.Case("tiny", "q", 8, 4, 16, "ranks")
    given = bench_sgmv.Inputs(case, Place(DeviceRef.CPU()), np.random.default_rng(0))
    assert given.ranks.tolist() == [2, 16, 4, 8]
    sides = 80 + 96
    assert given.work.bytes == 4 * (8 * (80 + 2 * 96) + 30 * sides)
    assert given.work.flops == 2 * 2 * 30 * sides


def test_slots_of_rows(rng: np.random.Generator) -> None:
    def of(mix: str, rows: int = 400, slots: int = 64) -> Sequence[int]:
        found = slots_of_rows(mix, rows, slots, rng)
        assert found.dtype == np.int32
        assert len(found) == rows
        assert found.max() < slots
        return [int(slot) for slot in found]

    assert sorted(of("distinct", 64)) == list(range(64))
    assert sorted(of("ranks", 64)) == list(range(64))
    assert set(of("uniform")) == set(range(20))
    assert len(set(of("identical"))) == 1
    counts = np.bincount(of("zipf"))
    assert counts[0] > 2 * counts[1] > 0
    assert of("halfbase")[1::2] == [-1] * 200
    assert min(of("halfbase")[::2]) >= 0
    assert of("seg4", 10, 3) == [0, 0, 0, 1, 1, 2, 2, 2, 0, 0]
    with pytest.raises(ValueError, match="mix must be a pattern of rows, got 'else'"):
        of("else")


def test_cache_and_its_parts_agree(rng: np.random.Generator) -> None:
    cache = random_cache([5, 0, 9], [2, 3, 1], 4, 2, 8, np.float32, rng)
    pages = cache.lookup_table[cache.lookup_table < len(cache.blocks)]
    assert sorted(pages) == list(range(2 + 1 + 3))
    for b, length in enumerate((7, 3, 10)):
        small = one_sequence(cache, b, length, length - 1)
        for position in range(length):
            page, slot = divmod(position, 4)
            wanted = cache.blocks[cache.lookup_table[b, page], :, 0, slot]
            np.testing.assert_array_equal(small.blocks[page, :, 0, slot], wanted)
            got = device_rows(cache.blocks, cache, b, position, position + 1)
            np.testing.assert_array_equal(got[:, 0], wanted)
        whole = device_rows(cache.blocks, cache, b, 1, length)
        np.testing.assert_array_equal(
            whole[:, -1], device_rows(cache.blocks, cache, b, length - 1, length)[:, 0]
        )


def test_no_two_rows_of_a_large_array_agree(rng: np.random.Generator) -> None:
    array = random_array((600, 4096), np.float32, rng, size=2.0)
    assert len(np.unique(array[:, :16], axis=0)) == 600
    assert array.std() == pytest.approx(2.0, rel=0.01)


@pytest.mark.gpu
def test_clock_of_the_gpu(gpu: object) -> None:
    """One element takes microseconds; a gibibyte no less than any memory there is needs for it."""
    place = Place(DeviceRef.GPU())
    assert 0 < place.least_reading() < 50e-6
    large = place.asarray(random_array((1 << 28,), np.float32, np.random.default_rng(0)))
    assert large.nbytes / 20e12 < place.median_of(lambda: large.fill(1.0)) < 0.1
