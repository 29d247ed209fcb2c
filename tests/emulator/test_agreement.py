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
from tests.emulator.backend import EmulatedArray

INSTANCE = tiles.instances()[0]


def compare(old: Any, gpu: Any, cpu: Any) -> Written:
    both = Twice(emulator)
    both._compare(INSTANCE, "argument 3", old, gpu, cpu)
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


def twice(monkeypatch: pytest.MonkeyPatch, word: Any, on_gpu: Any, on_cpu: Any) -> Twice:
    """`Twice` of a GPU that is none: `on_gpu` and `on_cpu` get the arguments of a launch."""
    stream = SimpleNamespace(is_capturing=lambda: False)
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream))
    known = (OnDevice, EmulatedArray)
    cpu = SimpleNamespace(launch=lambda _, __, args: on_cpu(*args), empty=emulator.empty)
    monkeypatch.setattr(jit, "import_cupy", lambda: cupy)
    monkeypatch.setattr(agreement, "_is_array", lambda arg: isinstance(arg, known))
    monkeypatch.setattr(agreement, "_bytes", lambda array: array.get().view(np.uint8))
    monkeypatch.setattr(agreement, "emulator", cpu)
    gpu = SimpleNamespace(
        launch=lambda _, __, args: on_gpu(*args), empty=None, error_word=lambda: word
    )
    return Twice(gpu)


def test_errors_of_earlier_launches_are_kept_and_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    word = np.full(1, 8, np.uint32).view(OnDevice)  # an earlier launch's

    def report(word: Any) -> None:
        word[0] |= 1

    both = twice(monkeypatch, word, report, report)
    both.launch(INSTANCE, (1,), (word,))
    (written,) = both.written
    assert Written(*written).same == 1
    assert word[0] == 9


def test_members_of_a_struct_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    word, member = np.zeros(1, np.uint32).view(OnDevice), np.zeros(3, np.int32).view(OnDevice)

    def write(value: int) -> Any:
        def launch(number: int, struct: Any) -> None:
            assert (number, struct[0], struct[2]) == (5, None, 6)
            struct[1][1] = value

        return launch

    args = (5, jit.Struct((None, member, 6)))
    both = twice(monkeypatch, word, write(7), write(7))
    both.launch(INSTANCE, (1,), args)
    (written,) = both.written
    assert Written(*written).same == 1
    both = twice(monkeypatch, word, write(8), write(9))
    with pytest.raises(AssertionError, match=r"argument 1\[1\]: \[8\] on the GPU, \[9\] emulated"):
        both.launch(INSTANCE, (1,), args)


def test_rows_of_an_adapter_may_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    word = np.zeros(1, np.uint32).view(OnDevice)
    args: list[Any] = [None] * 4
    args += [np.zeros(3, np.int32).view(OnDevice) for _ in range(2)]  # places, rows

    def write(*rows: int) -> Any:
        def launch(*args: Any) -> None:
            args[4][:], args[5][:] = rows[::-1], rows

        return launch

    route = tiles.sgmv_route_items()
    twice(monkeypatch, word, write(3, 1, 2), write(1, 2, 3)).launch(route, (1,), args)
    with pytest.raises(AssertionError, match="argument 5: "):
        twice(monkeypatch, word, write(3, 1, 1), write(1, 2, 3)).launch(route, (1,), args)
