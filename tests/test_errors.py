"""The sticky error word: its bits, and what `check_errors` says."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

import lorakit
from lorakit import errors, jit


def test_nothing_to_report() -> None:
    """Without a kernel run there is nothing to read, and CuPy is not needed."""
    lorakit.check_errors()


def test_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits of all devices, named; then the words are clear."""
    words = {"GPU 0": 1 | 8, "GPU 1": 0, "GPU 2": 2 | 4}

    def take() -> Iterator[tuple[str, int]]:
        for place in words:
            yield place, words[place]
            words[place] = 0

    monkeypatch.setattr(jit, "take_errors", take)
    with pytest.raises(lorakit.DeviceValueError) as caught:
        lorakit.check_errors()
    assert str(caught.value) == "; ".join(
        f"{place}: {errors.MEANINGS[bit]}"
        for place, bit in (("GPU 0", 1), ("GPU 0", 8), ("GPU 2", 2), ("GPU 2", 4))
    )
    lorakit.check_errors()


def test_it_is_a_value_error() -> None:
    assert issubclass(lorakit.DeviceValueError, ValueError)


def test_bits_are_those_of_the_kernels() -> None:
    header = (jit.sources() / "common" / "errors.cuh").read_text()
    bits = [int(bit) for bit in re.findall(r"\bk\w+ = (\d+)", header)]
    assert sorted(bits) == sorted(errors.MEANINGS)
