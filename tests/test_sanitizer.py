"""compute-sanitizer over the tests marked `sanitize`, which launch each kernel instance.

First each tool is shown a kernel with the mistake it looks for and one without: so a silent tool is a
tool that works. CuPy's memory pool is off, else reads past an array would land in the pool unseen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOUND = (
    86  # compute-sanitizer's exit status when it reports something; neither Python's nor pytest's
)

# One block of 64 threads on x and y, 64 floats each; nothing was ever written to x.
MISTAKES = {
    "memcheck": "y[t] = 1.0f; if (t == 63) y[t] = y[t + 1];",
    "racecheck": "__shared__ float s[64]; s[t] = t; y[t] = s[63 - t];",
    "initcheck": "y[t] = x[t];",
    "synccheck": "if (t < 40) __syncthreads(); y[t] = 1.0f;",
}
NO_MISTAKE = "__shared__ float s[64]; s[t] = t; __syncthreads(); y[t] = s[63 - t];"
PROGRAM = """
import cupy
cupy.cuda.set_allocator(None)
x, y = cupy.empty(64, cupy.float32), cupy.empty(64, cupy.float32)
source = 'extern "C" __global__ void planted(float* x, float* y) {{ int t = threadIdx.x; {} }}'
cupy.RawKernel(source, "planted")((1,), (64,), (x, y))
cupy.cuda.Device().synchronize()
"""


@pytest.fixture
def sanitizer(gpu: Any) -> str:
    """The path of compute-sanitizer; skips without a GPU, and where it is not installed."""
    folders = [os.environ.get("PATH", "")]
    for home in (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home:
            folders += [f"{home}/bin", f"{home}/compute-sanitizer"]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        pytest.skip("compute-sanitizer is not installed: it is part of the CUDA toolkit")
    return found


def run(sanitizer: str, tool: str, *command: str, seconds: int) -> subprocess.CompletedProcess[str]:
    """A Python command under a tool; API errors that CuPy asks for and handles are no findings."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    return subprocess.run(
        [sanitizer, *options, "--print-limit", "20", sys.executable, *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


each_tool = pytest.mark.parametrize("tool", MISTAKES)


@each_tool
def test_the_tool_reports_a_planted_mistake(tool: str, sanitizer: str) -> None:
    planted = run(sanitizer, tool, "-c", PROGRAM.format(MISTAKES[tool]), seconds=300)
    assert planted.returncode == FOUND, planted.stdout + planted.stderr
    assert "planted" in planted.stdout  # the name of the kernel
    clean = run(sanitizer, tool, "-c", PROGRAM.format(NO_MISTAKE), seconds=300)
    assert clean.returncode == 0, clean.stdout + clean.stderr


@each_tool
def test_every_kernel_instance_is_clean(tool: str, sanitizer: str) -> None:
    result = run(
        sanitizer,
        tool,
        *("-m", "pytest", "tests/ops", "-m", "sanitize", "-q", "-x"),
        *("--kernels", "gpu", "--no-memory-pool", "-p", "no:cacheprovider"),
        seconds=1800,
    )
    output = (result.stdout + result.stderr)[-20000:]
    assert result.returncode == 0, output
    assert " passed" in result.stdout, output  # and not all skipped
