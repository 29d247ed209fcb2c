"""Element types, with MAX's names."""

from __future__ import annotations

import builtins
import enum
from typing import Any

import numpy as np

from lorakit.dtypes import bfloat16


class DType(enum.Enum):
    """The type of an array's elements (MAX `max.dtype.DType`).

    bfloat16 is `ml_dtypes.bfloat16` in NumPy and CuPy. The 8-bit floats are carried as uint8, as in
    MAX, because CuPy has no type for them.
    """

    bool = "bool"
    int8 = "int8"
    int16 = "int16"
    int32 = "int32"
    int64 = "int64"
    uint8 = "uint8"
    uint16 = "uint16"
    uint32 = "uint32"
    uint64 = "uint64"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float8_e4m3fn = "float8_e4m3fn"
    float8_e4m3fnuz = "float8_e4m3fnuz"
    float8_e5m2 = "float8_e5m2"
    float8_e5m2fnuz = "float8_e5m2fnuz"
    float8_e8m0fnu = "float8_e8m0fnu"
    float4_e2m1fn = "float4_e2m1fn"

    @property
    def size_in_bits(self) -> int:
        """Bits of one element."""
        return 4 if self is DType.float4_e2m1fn else 8 * self.to_numpy().itemsize

    @property
    def size_in_bytes(self) -> int:
        """Bytes of one element; `ValueError` for float4_e2m1fn, of which two share a byte."""
        if self.size_in_bits % 8:
            raise ValueError(
                f"{self.value} has {self.size_in_bits} bits, not a whole number of bytes"
            )
        return self.size_in_bits // 8

    @property
    def align(self) -> int:
        """Alignment of one element, in bytes."""
        return 1 if self is DType.float4_e2m1fn else self.size_in_bytes

    def is_float(self) -> builtins.bool:
        """True for every floating point type, of any width."""
        return "float" in self.value

    def is_integral(self) -> builtins.bool:
        """True for the signed and unsigned integers; bool is not one."""
        return "int" in self.value

    def is_float8(self) -> builtins.bool:
        """True for the 8-bit floats."""
        return self.value.startswith("float8")

    def is_half(self) -> builtins.bool:
        """True for the 16-bit floats, float16 and bfloat16."""
        return self in (DType.float16, DType.bfloat16)

    def to_numpy(self) -> np.dtype[Any]:
        """The dtype of arrays that hold these elements (MAX refuses bfloat16).

        Raises:
            ValueError: float4_e2m1fn, which has no array type.
        """
        if self is DType.float4_e2m1fn:
            raise ValueError("float4_e2m1fn has no NumPy dtype: two elements share a byte")
        if self.is_float8():
            return np.dtype(np.uint8)
        return bfloat16 if self is DType.bfloat16 else np.dtype(self.value)

    @classmethod
    def from_numpy(cls, dtype: Any) -> DType:
        """The member for a NumPy or `ml_dtypes` dtype; uint8 is `DType.uint8`.

        Raises:
            ValueError: No member has this dtype.
        """
        name = np.dtype(dtype).name
        try:
            return cls(name)
        except ValueError:
            raise ValueError(f"dtype must be one of {[m.value for m in cls]}, got {name}") from None
