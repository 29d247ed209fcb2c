"""Element types against NumPy's own description of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lorakit import DType

NAMES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 bfloat16 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn"
)


def test_members_are_those_of_max() -> None:
    assert {member.name for member in DType} == set(NAMES.split())


@pytest.mark.parametrize(
    "name", [n for n in NAMES.split() if not n.startswith(("float8", "float4"))]
)
def test_round_trip_through_numpy(name: str) -> None:
    expected = np.dtype(getattr(ml_dtypes, name, name))
    member = DType[name]
    assert member.to_numpy() == expected
    assert DType.from_numpy(expected) is member
    assert member.size_in_bytes == member.align == expected.itemsize
    assert member.size_in_bits == 8 * expected.itemsize


@pytest.mark.parametrize("name", NAMES.split()[13:18])
def test_float8_is_carried_as_uint8(name: str) -> None:
    assert DType[name].to_numpy() == np.uint8
    assert DType.from_numpy(getattr(ml_dtypes, name)) is DType[name]
    assert DType[name].is_float8()
    assert DType[name].is_float()
    assert not DType[name].is_integral()


def test_float4_has_no_array_type() -> None:
    member = DType.float4_e2m1fn
    assert member.size_in_bits == 4
    assert member.is_float()
    assert not member.is_float8()
    with pytest.raises(ValueError, match="two elements share a byte"):
        member.to_numpy()
    with pytest.raises(ValueError, match="has 4 bits"):
        _ = member.size_in_bytes


def test_classes() -> None:
    assert {m.name for m in DType if m.is_half()} == {"float16", "bfloat16"}
    assert {m.name for m in DType if m.is_integral()} == {
        f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
    }
    assert not DType.bool.is_float()


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="complex64"):
        DType.from_numpy(np.complex64)
