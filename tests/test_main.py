"""`python -m lorakit`: it passes, it says what it did, and it fails when something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit import DeviceRef, LinearLoRA, LoRABatch, PagedKVCacheManager, tiles
from lorakit.__main__ import main
from lorakit.demo import clock
from lorakit.demo.block import DecoderBlock
from lorakit.demo.workload import STEPS
from tests.conftest import has_gpu

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed was run before; timing it adds nothing to a test."""
    monkeypatch.setattr(clock, "median_seconds", lambda call, device, rounds: 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_serves_on_the_cpu(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--dtype", dtype]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if re.match(r"\d ", line)]
    assert [int(row[0]) for row in rows] == list(range(len(STEPS)))
    for row in rows:
        shares = [float(cell[:-1]) for cell in row if cell.endswith("%")]
        assert len(shares) == 3
        assert all(0 < share <= 100 for share in shares)
        assert float(row[-1]) > 0  # tokens/s
    assert dtype in out
    assert re.search(r"all \d+ checks passed", out)
    assert err == ""


@pytest.mark.gpu
def test_serves_on_the_gpu(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "gpu", "--model", "tiny"]) == 0
    assert "replay" not in capsys.readouterr().err


def test_command_line_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "checks passed" in done.stdout


def test_info_names_versions_and_every_instance(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for name in ("lorakit", "NumPy", "ml_dtypes", "CuPy", "device"):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE), name
    for instance in tiles.instances():
        assert instance.name in out


@pytest.mark.skipif(has_gpu(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--device", "gpu"])
    assert refused.value.code == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


# ---- It fails when something is wrong --------------------------------------------------------------

Fault = Callable[[pytest.MonkeyPatch], None]


def after_load(change: Callable[[DecoderBlock], None]) -> Fault:
    """A fault in the layers' weights, of which the oracles know nothing."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        load = DecoderBlock._load

        def faulty(block: DecoderBlock, weights: Any) -> None:
            load(block, weights)
            change(block)

        monkeypatch.setattr(DecoderBlock, "_load", faulty)

    return plant


def scale_an_adapter(block: DecoderBlock) -> None:
    a = block.attention.v_proj.lora_A[2]
    a[...] = (a.astype(np.float32) * np.float32(1.25)).astype(a.dtype)


def cut_a_rank(block: DecoderBlock) -> None:
    block.mlp["down"].set_slot_rank(1, 20)


def change_a_base_weight(block: DecoderBlock) -> None:
    block.attention.o_proj.weight[7] = 0


def swap_the_rotary_layout(block: DecoderBlock) -> None:
    block.rope.interleaved = not block.rope.interleaved


def forget_the_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    set_adapter = LinearLoRA.set_adapter
    monkeypatch.setattr(
        LinearLoRA,
        "set_adapter",
        lambda self, slot, a, b, *, scaling: set_adapter(self, slot, a, b),
    )


def give_base_rows_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    set_lora_batch = DecoderBlock.set_lora_batch

    def faulty(block: DecoderBlock, batch: LoRABatch) -> None:
        set_lora_batch(
            block, batch._replace(lora_ids=np.maximum(batch.lora_ids, 0), lora_ranks=None)
        )

    monkeypatch.setattr(DecoderBlock, "set_lora_batch", faulty)


def lose_the_cache_of_earlier_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = PagedKVCacheManager.fetch

    def faulty(manager: PagedKVCacheManager, *arguments: Any) -> Any:
        manager.blocks[...] = 0
        return fetch(manager, *arguments)

    monkeypatch.setattr(PagedKVCacheManager, "fetch", faulty)


FAULTS: dict[str, tuple[Fault, str]] = {
    "an adapter a quarter too large": (after_load(scale_an_adapter), "attention"),
    "four ranks of an adapter cut off": (after_load(cut_a_rank), "mlp down"),
    "one row of a base weight": (after_load(change_a_base_weight), "attention"),
    "the other rotary layout": (after_load(swap_the_rotary_layout), "attention"),
    "scaling not applied": (forget_the_scaling, "attention"),
    "base rows with an adapter": (give_base_rows_an_adapter, "attention"),
    "earlier keys and values lost": (lose_the_cache_of_earlier_steps, "attention"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_makes_it_fail(
    fault: str, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, place = FAULTS[fault]
    plant(monkeypatch)
    assert main(["--device", "cpu", "--dtype", dtype]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"\d+ of \d+ checks FAILED", out)
    assert "FAIL" in out
    # Both oracles see it.
    assert re.search(rf"FAILED {place}.*, reference: .*budget", err)
    assert re.search(rf"FAILED {place}.*, merged: .*budget", err)


def test_the_default_device_is_the_gpu_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def serve(*arguments: Any) -> int:
        seen.append(arguments)
        return 0

    monkeypatch.setattr("lorakit.__main__.serve", serve)
    monkeypatch.setattr(DeviceRef, "current", staticmethod(DeviceRef.GPU))
    assert main([]) == 0
    device, dtype, model, _ = seen[0]
    assert (str(device), dtype.value, model) == ("gpu:0", "bfloat16", "llama-3-8b")
