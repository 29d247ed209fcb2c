"""What is installed: names, files, and an import that is quick and needs no CuPy."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit

REPOSITORY = Path(__file__).resolve().parents[1]


def python(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def test_import_is_quick() -> None:
    """Under 0.3 s, NumPy included. On a machine too busy for that: less than NumPy's own import.

    CPU time is counted, since others may share the machine; and that of one thread, since NumPy's BLAS starts
    one for each core.
    """
    script = (
        "from time import process_time as now; start = now(); import numpy; middle = now()\n"
        "import lorakit; print(middle - start, now() - middle)"
    )
    times = [tuple(map(float, python(script).split())) for _ in range(5)]
    assert any(numpy + own < 0.3 or own < numpy for numpy, own in times), times


def test_import_brings_no_gpu_library() -> None:
    script = "import sys, lorakit, lorakit.reference, lorakit.testing; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in python(script).split()}
    assert "lorakit" in loaded
    assert not loaded & {"cupy", "cupy_backends", "cuda", "scipy", "torch"}


def test_public_names() -> None:
    assert lorakit.__all__ == sorted(lorakit.__all__)
    assert {name for name in lorakit.__all__ if not hasattr(lorakit, name)} == set()
    documented = {"AttentionWithRopeAndLoRA", "LinearLoRA", "SupportsLoRA", "check_errors", "Graph"}
    assert documented <= set(lorakit.__all__)


# ---- setup.cfg -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_version(setup: configparser.RawConfigParser) -> None:
    assert setup["metadata"]["version"] == lorakit.__version__
    try:
        installed = importlib.metadata.version("lorakit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lorakit is not installed, only the checkout was compared")
    assert installed == lorakit.__version__


def folder_of(package: str, setup: configparser.RawConfigParser) -> Path:
    """Where the files of a package lie in the checkout."""
    places = dict(line.split(" = ") for line in lines(setup["options"]["package_dir"]))
    return REPOSITORY / places.get(package, package.replace(".", "/"))


def test_every_file_is_installed(setup: configparser.RawConfigParser) -> None:
    """Each Python file, CUDA source and py.typed belongs to a package that is listed."""
    installed = set()
    for package in lines(setup["options"]["packages"]):
        patterns = ["*.py", *lines(setup["options.package_data"].get(package, ""))]
        for path in folder_of(package, setup).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
                installed.add(path.relative_to(REPOSITORY))
    files = {
        path.relative_to(REPOSITORY)
        for top in ("lorakit", "cuda_src")
        for path in (REPOSITORY / top).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert installed == files
    assert Path("lorakit/py.typed") in installed


def test_requirements(setup: configparser.RawConfigParser) -> None:
    """A plain install needs NumPy and ml_dtypes; no test extra brings cuBLAS, `test` no CuPy either."""
    assert lines(setup["options"]["install_requires"]) == ["numpy>=2.1.2", "ml_dtypes"]
    extras = {name: " ".join(lines(text)) for name, text in setup["options.extras_require"].items()}
    assert {"cuda12", "cuda13", "test", "test-cpu"} <= set(extras)
    assert "cupy" not in extras["test"]
    assert "cublas" not in extras["test-cpu"]
    for extra, cupy in (("cuda12", "12x"), ("cuda13", "13x"), ("test-cpu", "12x")):
        assert f"cupy-cuda{cupy}>=14.2" in extras[extra]
        assert "cudart,nvrtc]" in extras[extra]
