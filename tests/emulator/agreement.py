"""Each launch on a GPU, repeated on the emulator from the same bytes, and what both wrote compared."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit import dtypes, jit
from lorakit.tiles import Instance
from tests.emulator.backend import EmulatedArray, emulator

# Of the norm of a difference over that of the result. 16-bit results differ where a sum falls on the other
# side of a rounding. float32: sums in another order, `ex2` within 2 units, in the tests' longest products.
MOST_UNITS = {2: 1.0, 4: 64.0}
MOST_FLUSHED = 1024  # terms of a sum that a GPU makes zero and the emulator keeps: CuPy's -ftz=true
# Of an element, beside two units of its own: in units of float32's epsilon of the largest result.
MOST_NOISE = 64.0
# Arguments that depend on the order of atomics: an adapter's rows may come in any order, at any place.
IN_ANY_ORDER = {"sgmv_route_items_kernel": {"argument 5"}}
AT_ANY_PLACE = {"sgmv_route_items_kernel": {"argument 4"}}


@dataclass(frozen=True)
class Written:
    """What a launch wrote into one array.

    Attributes:
        kernel: The instance's name.
        dtype: Of the array.
        elements: Changed by the GPU or by the emulator.
        same: Of these, those with the same bits.
        units: Norm of the difference over the norm of the emulator's result, in units of the dtype's epsilon.
    """

    kernel: str
    dtype: str
    elements: int
    same: int
    units: float


class Twice:
    """The `launch` and `empty` of a GPU's backend, so that each launch runs on the emulator too.

    A launch that is captured runs on the GPU only. Of a launch that reports bad values only the error word is
    compared: what it computes is within bounds, but may depend on the order of threads.

    Attributes:
        written: The fields of a `Written` for each array that a launch wrote to.
    """

    def __init__(self, backend: Any) -> None:
        self._backend, self._launch, self._empty = backend, backend.launch, backend.empty
        self.written: list[tuple[Any, ...]] = []

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Poisoned, so that what a launch writes is new."""
        array = self._empty(shape, dtype)
        if array.size:
            array.view(np.uint8).fill(0xFF)
        return array

    def launch(self, instance: Instance, grid: Sequence[int], args: Sequence[Any]) -> None:
        if jit.import_cupy().cuda.get_current_stream().is_capturing():
            self._launch(instance, grid, args)
            return
        word = self._backend.error_word()
        earlier = word.copy()
        word.fill(0)  # what this launch reports
        before = {name: _bytes(array) for name, array in _arrays(args)}
        copies = [_emulated_argument(f"argument {i}", arg, before) for i, arg in enumerate(args)]
        self._launch(instance, grid, args)
        emulator.launch(instance, grid, copies)
        is_bad = bool(word.get()[0])
        emulated = dict(_arrays(copies))
        for name, arg in _arrays(args):
            skipped = name in AT_ANY_PLACE.get(instance.kernel, ())
            if not arg.size or skipped or (is_bad and arg.dtype in dtypes.STORAGE):
                continue
            arrays = [_view(arg, before[name]), _view(arg, _bytes(arg)), np.asarray(emulated[name])]
            if name in IN_ANY_ORDER.get(instance.kernel, ()):
                arrays = [np.sort(array, axis=None) for array in arrays]
            self._compare(instance, name, *arrays)
        word |= earlier

    def _compare(
        self,
        instance: Instance,
        name: str,
        old: NDArray[Any],
        gpu: NDArray[Any],
        cpu: NDArray[Any],
    ) -> None:
        old_bits, gpu_bits, cpu_bits = map(_bits, (old, gpu, cpu))
        changed = (gpu_bits != old_bits) | (cpu_bits != old_bits)
        if not changed.any():
            return
        what = f"{instance.name}, {name}"
        same = gpu_bits[changed] == cpu_bits[changed]
        gpu, cpu = gpu[changed], cpu[changed]
        if gpu.dtype not in dtypes.STORAGE:
            assert same.all(), f"{what}: {gpu[~same][:5]} on the GPU, {cpu[~same][:5]} emulated"
            units = 0.0
        else:
            units = _units(what, gpu, cpu)
            most = MOST_UNITS[gpu.itemsize]
            assert units <= most, (
                f"{what}: {units:.3g} units apart, more than rounding explains ({most})"
            )
        written = Written(instance.name, gpu.dtype.name, gpu.size, int(same.sum()), units)
        self.written.append(astuple(written))


def table(rows: Iterable[Written]) -> str:
    """A line for each kernel instance and dtype that it writes."""
    groups: dict[tuple[str, str], list[Written]] = defaultdict(list)
    for row in rows:
        groups[row.kernel, row.dtype].append(row)
    lines = [f"{'writes':>8} {'elements':>10} {'same bits':>10} {'units':>6}  dtype     kernel"]
    for (kernel, dtype), group in sorted(groups.items()):
        elements, same = (sum(getattr(row, name) for row in group) for name in ("elements", "same"))
        share = math.floor(1000 * same / elements) / 10
        units = max(row.units for row in group)
        name = kernel.removeprefix("lorakit::")
        lines.append(f"{len(group):8} {elements:10} {share:9.1f}% {units:6.2f}  {dtype:8}  {name}")
    return "\n".join(lines)


def _units(what: str, gpu: NDArray[Any], cpu: NDArray[Any]) -> float:
    with np.errstate(invalid="ignore"):  # signaling NaNs
        ours, theirs = gpu.astype(np.float64), cpu.astype(np.float64)
    finite = np.isfinite(ours) & np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite], what)
    ours, theirs = ours[finite], theirs[finite]
    single = np.finfo(np.float32)
    most = 2 * dtypes.ulp(np.maximum(np.abs(ours), np.abs(theirs)), gpu.dtype)
    most += MOST_NOISE * float(single.eps) * np.abs(theirs).max(initial=0.0) + float(single.tiny)
    lost = np.abs(ours - theirs) > most
    assert not lost.any(), (
        f"{what}: {ours[lost][:5]} on the GPU, {theirs[lost][:5]} emulated, more than rounding explains"
    )
    epsilon = float(dtypes.ulp(1.0, gpu.dtype))
    flushed = MOST_FLUSHED * np.finfo(np.float32).tiny * math.sqrt(ours.size)
    difference = float(np.linalg.norm(ours - theirs))
    return difference / (epsilon * float(np.linalg.norm(theirs))) if difference > flushed else 0.0


def _is_array(arg: Any) -> bool:
    return isinstance(arg, EmulatedArray) or hasattr(getattr(arg, "data", None), "ptr")


def _arrays(args: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The arrays of arguments and of their members, each with its name."""
    for i, arg in enumerate(args):
        members = enumerate(arg) if isinstance(arg, jit.Struct) else [(None, arg)]
        for j, member in members:
            if _is_array(member):
                yield f"argument {i}" + ("" if j is None else f"[{j}]"), member


def _emulated_argument(name: str, arg: Any, before: Mapping[str, NDArray[np.uint8]]) -> Any:
    if isinstance(arg, jit.Struct):
        return jit.Struct(_emulated_argument(f"{name}[{j}]", m, before) for j, m in enumerate(arg))
    return _emulated(arg, before[name]) if _is_array(arg) else arg


def _span(array: Any) -> int:
    """Bytes from an array's first element to its last."""
    if not array.size:
        return 0
    steps = zip(array.shape, array.strides, strict=True)
    return int(sum((size - 1) * stride for size, stride in steps) + array.dtype.itemsize)


def _bytes(array: Any) -> NDArray[np.uint8]:
    cupy = jit.import_cupy()
    span: NDArray[np.uint8] = cupy.ndarray((_span(array),), np.uint8, memptr=array.data).get()
    return span


def _view(array: Any, data: NDArray[np.uint8]) -> NDArray[Any]:
    """The array's elements among its bytes."""
    return np.ndarray(array.shape, array.dtype, buffer=data, strides=array.strides)


def _emulated(array: Any, data: NDArray[np.uint8]) -> EmulatedArray:
    memory = emulator.empty(data.size, np.uint8)
    memory[...] = data
    if not array.size:
        return emulator.empty(array.shape, array.dtype)
    return EmulatedArray(array.shape, array.dtype, buffer=memory, strides=array.strides)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(f"u{array.dtype.itemsize}")
