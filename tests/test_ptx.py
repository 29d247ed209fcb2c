"""The instructions that NVRTC makes of common/ptx.cuh and shared.cuh, which the emulator replaces by twins.

Each function is called by a small kernel, and its PTX is read: the instruction, and which operand is which.
"""

from __future__ import annotations

import re

import pytest

from lorakit import jit

# Kernels; their parameters name the operands.
SOURCE = r"""
#include <common/attention.cuh>
#include <common/ptx.cuh>
#include <common/shared.cuh>

using namespace lorakit;

extern "C" __global__ void copy(const void* global, int bytes) {
  SharedMemory memory;
  cp_async_16(memory.take<float>(4), global, bytes);
  cp_async_commit();
  cp_async_wait<3>();
  cp_async_wait<0>();
}

template <typename Load>
__device__ void load(unsigned* d, const int* lane, Load instruction) {
  SharedMemory memory;
  unsigned values[4];
  instruction(values, memory.take<unsigned short>(512) + *lane);
  for (int i = 0; i < 4; ++i) d[i] = values[i];
}
extern "C" __global__ void rows(unsigned* d, const int* lane) {
  load(d, lane, [](unsigned (&v)[4], const void* row) { ldmatrix_x4(v, row); });
}
extern "C" __global__ void columns(unsigned* d, const int* lane) {
  load(d, lane, [](unsigned (&v)[4], const void* row) { ldmatrix_x4_trans(v, row); });
}

extern "C" __global__ void transpose(unsigned* d, const unsigned* pair) { *d = movmatrix_trans(*pair); }

template <typename T>
__device__ void multiply(float* d, const unsigned* a, const unsigned* b) {
  float sums[4];
  unsigned left[4], right[2];
  for (int i = 0; i < 4; ++i) sums[i] = d[i];
  for (int i = 0; i < 4; ++i) left[i] = a[i];
  for (int i = 0; i < 2; ++i) right[i] = b[i];
  mma_m16n8k16(sums, left, right, T());
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}
extern "C" __global__ void mma_half(float* d, const unsigned* a, const unsigned* b) {
  multiply<__half>(d, a, b);
}
extern "C" __global__ void mma_bfloat16(float* d, const unsigned* a, const unsigned* b) {
  multiply<__nv_bfloat16>(d, a, b);
}

extern "C" __global__ void exponential(float* y, const float* x) { *y = ex2(*x); }

extern "C" __global__ void soft_cap(float* y, const float* x) {
  *y = AttentionOptions<float>{1.0f, 2.0f}.squash(*x);
}

extern "C" __global__ void meet(const int* id, const int* threads) { named_barrier(*id, *threads); }

extern "C" __global__ void order(int) {
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
}

// How far apart arrays of 3 float, 17 __half and 1 int are.
extern "C" __global__ void arrays(long long* apart) {
  SharedMemory memory;
  const char* first = reinterpret_cast<const char*>(memory.take<float>(3));
  const char* second = reinterpret_cast<const char*>(memory.take<__half>(17));
  const char* third = reinterpret_cast<const char*>(memory.take<int>(1));
  apart[0] = second - first;
  apart[1] = third - second;
}
"""
FRAGMENTS = "{d, d+4, d+8, d+12}, {a, a+4, a+8, a+12}, {b, b+4}, {d, d+4, d+8, d+12}"
EXPECTED = {
    "copy": [
        "cp.async.cg.shared.global [shared], [global], 16, bytes",
        "cp.async.commit_group",
        "cp.async.wait_group 3",
        "cp.async.wait_group 0",
    ],
    "rows": ["ldmatrix.sync.aligned.m8n8.x4.shared.b16 {d, d+4, d+8, d+12}, [shared]"],
    "columns": ["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {d, d+4, d+8, d+12}, [shared]"],
    "transpose": ["movmatrix.sync.aligned.m8n8.trans.b16 d, pair"],
    "mma_half": [f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {FRAGMENTS}"],
    "mma_bfloat16": [f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {FRAGMENTS}"],
    "exponential": ["ex2.approx.ftz.f32 y, x"],
    "meet": ["barrier.sync id, threads"],
    "order": [
        "griddepcontrol.wait",
        "griddepcontrol.launch_dependents",
    ],
    "arrays": ["16 to apart", "48 to apart+8"],
}


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    """The body of each kernel."""
    pytest.importorskip("cupy")
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda import nvrtc

    flags = assemble_cupy_compiler_options(("-std=c++17", f"-I{jit.sources()}"))
    program = nvrtc.createProgram(SOURCE, "instructions.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, (*flags, "--gpu-architecture=compute_90"))
        except nvrtc.NVRTCError:
            raise AssertionError(nvrtc.getProgramLog(program)) from None
        text = nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    text = text if isinstance(text, str) else text.decode()
    return dict(re.findall(r"\.entry (\w+)(\(.*?^})", text, re.DOTALL | re.MULTILINE))


def instructions(kernel: str, body: str) -> list[str]:
    """What a kernel does but for moving operands, each operand under the name of its parameter."""
    signature = re.search(rf"void {kernel}\((.*?)\)", SOURCE)
    assert signature is not None
    names = [parameter.split()[-1].lstrip("*") for parameter in signature[1].split(",")]
    operands: dict[str, str] = {}  # of registers
    found = []
    lines = [line.strip().rstrip(";") for line in body.splitlines()]
    for line in lines:
        words = [word for word in re.split(r"[\s,\[\]]+", line) if word]
        if match := re.match(rf"ld\.param\.\w+\s+(%\w+), \[{kernel}_param_(\d+)]", line):
            operands[match[1]] = names[int(match[2])]
        elif re.match(r"(ld\.global|cvta|mov|cvt|add|shl)\b", line):
            source, _, offset = words[2].partition("+")
            known = operands.get(source, "shared" if "arena" in source else source)
            operands[words[1]] = f"{known}+{offset}" if offset else known
        elif line.startswith("st.global"):
            target, _, offset = words[1].partition("+")
            place = operands[target] + (f"+{offset}" if offset else "")
            if words[2] not in operands:
                operands[words[2]] = place
            elif operands[words[2]].isdigit():
                found.append(f"{operands[words[2]]} to {place}")
        elif line and not re.match(r"[.(){}/]|ret", line):
            found.append(line)
    return [
        re.sub(r"%\w+", lambda match: operands[match[0]], line).replace("\t", " ") for line in found
    ]


@pytest.mark.parametrize("kernel", EXPECTED)
def test_instructions(kernel: str, ptx: dict[str, str]) -> None:
    found = [" ".join(line.split()) for line in instructions(kernel, ptx[kernel])]
    assert found == EXPECTED[kernel]


def test_the_hyperbolic_tangent_is_not_approximate(ptx: dict[str, str]) -> None:
    """tanh.approx errs by 2**-11; tanhf, of which exp is a part, by units in the last place."""
    assert "ex2.approx" in ptx["soft_cap"]
    assert "tanh.approx" not in ptx["soft_cap"]
