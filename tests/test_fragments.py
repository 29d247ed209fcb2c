"""Which element of a matrix a lane holds: the PTX ISA's layouts, pinned on a GPU and on the emulator alike.

The emulator computes ldmatrix, movmatrix and mma from the same reading of the manual as the kernels. Here a
GPU says whether that reading is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorakit import jit
from lorakit.dtypes import bfloat16
from tests.emulator import build, emulator

if TYPE_CHECKING:
    from tests.conftest import KernelDevice

LANE = np.arange(32)
G, C = LANE // 4, 2 * (LANE % 4)  # group and first column, in the words of the PTX ISA


@dataclass(frozen=True)
class Kernel:
    """A kernel of tests/emulator/kernels/fragments.cu, for one warp."""

    name: str
    source: str = "fragments.cu"
    threads: int = 32
    shared_bytes: int = 1024

    def launch(self, kernels: KernelDevice, *args: Any) -> None:
        if kernels.name == "emulator":
            emulator.launch(self, (1,), args)
            return
        cupy = jit.import_cupy()
        module = cupy.RawModule(
            # The digest, because CuPy's cache does not see that an included header changed.
            code=f"// {jit.source_digest()}\n" + (build.KERNELS / self.source).read_text(),
            options=jit.options(int(cupy.cuda.Device().compute_capability)),
            name_expressions=(self.name,),
        )
        module.get_function(self.name)((1,), (self.threads,), args, shared_mem=self.shared_bytes)


def pairs(first: Any, second: Any) -> Any:
    """Registers of two 16-bit elements, the first in the lower half."""
    low, high = (np.asarray(half).view(np.uint16).astype(np.uint32) for half in (first, second))
    return low | high << 16


@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "trans"])
def test_ldmatrix(transpose: bool, kernels: KernelDevice, rng: np.random.Generator) -> None:
    matrices = rng.permutation(256).astype(np.uint16).reshape(4, 8, 8)
    registers = kernels.asarray(np.zeros((32, 4), np.uint32))
    kernel = Kernel(f"lorakit::ldmatrix_kernel<{'true' if transpose else 'false'}>")
    kernel.launch(kernels, registers, kernels.asarray(matrices))
    for i, matrix in enumerate(matrices.transpose(0, 2, 1) if transpose else matrices):
        expected = pairs(matrix[G, C].copy(), matrix[G, C + 1].copy())
        np.testing.assert_array_equal(kernels.to_host(registers)[:, i], expected)


def test_movmatrix(kernels: KernelDevice, rng: np.random.Generator) -> None:
    matrix = rng.permutation(64).astype(np.uint16).reshape(8, 8)
    registers = kernels.asarray(pairs(matrix[G, C], matrix[G, C + 1]))
    Kernel("lorakit::movmatrix_kernel").launch(kernels, registers)
    expected = pairs(matrix[C, G].copy(), matrix[C + 1, G].copy())
    np.testing.assert_array_equal(kernels.to_host(registers), expected)


@pytest.mark.parametrize(
    ("dtype", "cpp"),
    [(np.dtype(np.float16), "__half"), (bfloat16, "__nv_bfloat16")],
    ids=["float16", "bfloat16"],
)
def test_mma(dtype: Any, cpp: str, kernels: KernelDevice, rng: np.random.Generator) -> None:
    """Small integers, so that every sum is exact."""
    a, b = (rng.integers(-9, 10, shape).astype(dtype) for shape in ((16, 16), (16, 8)))
    sums = rng.integers(-99, 100, (16, 8)).astype(np.float32)
    a_parts = [(G, C), (G + 8, C), (G, C + 8), (G + 8, C + 8)]
    a_registers = np.stack([pairs(a[row, k], a[row, k + 1]) for row, k in a_parts], axis=1)
    b_registers = np.stack([pairs(b[k, G], b[k + 1, G]) for k in (C, C + 8)], axis=1)
    d_parts = [(G, C), (G, C + 1), (G + 8, C), (G + 8, C + 1)]
    d = kernels.asarray(np.stack([sums[part] for part in d_parts], axis=1))
    Kernel(f"lorakit::mma_kernel<{cpp}>").launch(
        kernels, d, kernels.asarray(a_registers), kernels.asarray(b_registers)
    )
    expected = sums + a.astype(np.float32) @ b.astype(np.float32)
    got = kernels.to_host(d)
    for i, part in enumerate(d_parts):
        np.testing.assert_array_equal(got[:, i], expected[part])
