"""The emulator's own tests need g++ and NVIDIA's headers."""

from __future__ import annotations

import shutil

import pytest

from tests.emulator import EmulatorError, build


@pytest.fixture(autouse=True)
def tools() -> None:
    """Skips where the emulator cannot compile."""
    if shutil.which(build.compiler()) is None:
        pytest.skip(f"needs {build.compiler()}")
    try:
        build.cuda_include()
    except EmulatorError as error:
        pytest.skip(str(error))
