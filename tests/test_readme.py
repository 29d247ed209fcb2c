"""What the README says runs, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lorakit import ops, testing

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "README.md").read_text()


def code(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_example_runs() -> None:
    example, _ = code("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    names: dict[str, Any] = {}
    exec(example, names)
    layer, y = names["layer"], names["y"]
    assert y.shape == (13, 128)
    assert np.array_equal(layer.slot_ranks, [8, 4])
    weights = [layer.weight + layer.lora_B[slot] @ layer.lora_A[slot] for slot in range(2)]
    x = names["x"]
    weights.append(layer.weight)
    parts = (x[:5], x[5:6], x[6:])
    expected = np.concatenate([part @ w.T for part, w in zip(parts, weights, strict=True)])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)


def test_cache_of_another_library() -> None:
    rng = np.random.default_rng(0)
    own = testing.paged_cache(
        (3, 0, 11),
        (2, 18, 1),
        page_size=5,
        n_kv_heads=2,
        head_dim=8,
        dtype=np.float32,
        rng=rng,
        num_layers=2,
        layer_idx=1,
    )
    pages = (1, 4, 3)
    used = [own.lookup_table[b, :count] for b, count in enumerate(pages)]
    names: dict[str, Any] = {
        "kv_caches": [own.blocks[:, :, layer].copy() for layer in range(2)],
        "page_size": 5,
        "qo_indptr": np.array([0, 2, 20, 21], np.int32),
        "kv_indptr": np.array([0, 1, 5, 8], np.int32),
        "kv_indices": np.concatenate(used).astype(np.int32),
        "kv_last_page_len": np.array([5, 3, 2], np.int32),
    }
    exec(code("python")[1], names)
    q = rng.standard_normal((21, 4, 8), np.float32)
    out, expected = (
        ops.attention_ragged(q, names["qo_indptr"], cache, 1) for cache in (names["cache"], own)
    )
    assert out.tobytes() == expected.tobytes()
    assert np.abs(out).max() > 0


def test_commands() -> None:
    """The two commands are whole in one line each, and `.ci/run` finds them."""
    commands = [line for line in TEXT.splitlines() if line.startswith("python -m pip install")]
    assert commands == [
        "python -m pip install . && python -m lorakit",
        "python -m pip install '.[test-cpu]' && python -m pytest",
    ]


def test_main_job() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lorakit", "--device", "cpu"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_exist() -> None:
    paths = re.findall(r"`((?:lorakit|cuda_src|tests|perf)/[\w/.]+)`", TEXT)
    assert len(paths) > 20
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_every_op_is_listed() -> None:
    assert [name for name in ops.__all__ if f"`{name}`" not in TEXT] == []
