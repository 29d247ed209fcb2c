"""What `--twice` calls agreement of GPU and emulator; a GPU runs it (.ci/gpu)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorakit import jit, tiles
from lorakit.dtypes import STORAGE
from lorakit.testing import activations
from tests.emulator import agreement, emulator
from tests.emulator.agreement import Twice, Written, table

INSTANCE = tiles.instances()[0]


def compare(old: Any, gpu: Any, cpu: Any) -> Written:
    both = Twice(emulator)
    both._compare(INSTANCE, 3, old, gpu, cpu)
    (written,) = both.written
    return Written(*written)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_one_unit_in_some_elements_agrees(dtype: Any, rng: np.random.Generator) -> None:
    old, new = np.full((50, 8), 99, dtype), activations((50, 8), dtype, rng)
    new[:10] = old[:10]
    off = new.copy()
    off.view(f"u{dtype.itemsize}")[20] += 1
    written = compare(old, off, new)
    assert (written.kernel, written.dtype) == (INSTANCE.name, dtype.name)
    assert (written.elements, written.same) == (40 * 8, 39 * 8)
    assert 0 < written.units < 1
    assert f" {320:10} " in table([written])
    assert " 97.5% " in table([written])


@pytest.mark.parametrize("rows", [50, 20_000])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_an_element_lost_does_not(dtype: Any, rows: int, rng: np.random.Generator) -> None:
    old, new = np.full((rows, 8), 99, dtype), activations((rows, 8), dtype, rng)
    new[7, 3] = 1
    off = new.copy()
    off[7, 3] = 0
    with pytest.raises(AssertionError, match=r"argument 3: .* more than rounding"):
        compare(old, off, new)
    off[7, 3] = np.nan
    with pytest.raises(AssertionError, match="argument 3"):
        compare(old, off, new)


def test_integers_agree_in_every_bit() -> None:
    old, new = np.zeros(1, np.uint32), np.full(1, 6, np.uint32)
    assert compare(old, new, new).same == 1
    with pytest.raises(AssertionError, match=r"\[6\] on the GPU, \[0\] emulated"):
        compare(old, new, old)


class OnDevice(np.ndarray[Any, Any]):
    """What stands for an array on a GPU."""

    def get(self) -> np.ndarray[Any, Any]:
        return np.asarray(self).copy()


def test_errors_of_earlier_launches_are_kept_and_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    word = np.full(1, 8, np.uint32).view(OnDevice)  # an earlier launch's

    def launch(instance: Any, grid: Any, args: Any) -> None:
        args[0][0] |= 1

    stream = SimpleNamespace(is_capturing=lambda: False)
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream))
    monkeypatch.setattr(jit, "import_cupy", lambda: cupy)
    monkeypatch.setattr(agreement, "_is_array", lambda arg: isinstance(arg, OnDevice))
    monkeypatch.setattr(agreement, "_bytes", lambda array: array.get().view(np.uint8))
    monkeypatch.setattr(agreement, "emulator", SimpleNamespace(launch=launch, empty=emulator.empty))
    both = Twice(SimpleNamespace(launch=launch, empty=None, error_word=lambda: word))
    both.launch(INSTANCE, (1,), (word,))
    (written,) = both.written
    assert Written(*written).same == 1
    assert word[0] == 9
