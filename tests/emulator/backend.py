"""Emulated device arrays, and the backend that runs kernels on them as CuPy's does on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import DTypeLike

from lorakit import jit
from tests.emulator import build, sanitizers
from tests.emulator.build import EmulatorError

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEDULES = ("in_order", "lifo", "random")
_GUARD_BYTES = 512
_ALIGNMENT = 256  # of a device allocation
_MOST_SHARED_BYTES = 227 * 1024  # of a block on sm_90
_NAN_BYTE = 0xFF  # four or two of them make a NaN
_MAP_NORESERVE = 0x4000  # of Linux; the module mmap has it from Python 3.13 on
_SPARSE_BYTES = 2**30  # larger arrays take only the memory of the pages that are touched


class KernelInstance(Protocol):
    """What the emulator needs of `lorakit.tiles.Instance`."""

    @property
    def source(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def threads(self) -> Any: ...  # int, or up to three ints
    @property
    def shared_bytes(self) -> int: ...


class EmulatedArray(np.ndarray[Any, Any]):
    """An array in the memory of the emulated device: a NumPy array that ops run kernels on.

    Slices and results of NumPy functions are emulated arrays too; `numpy.asarray` gives a
    plain view.
    """

    lorakit_backend: ClassVar[Emulator]


class _Allocation(np.ndarray[Any, Any]):
    """Bytes of one device allocation: guard, array, guard. The last ``base`` of its views."""

    begin: int  # the array's place in it
    end: int
    poisoned: bool  # AddressSanitizer guards the guards

    def damage(self) -> str:
        """What is wrong with the guards, or an empty string."""
        if self.poisoned:
            return ""
        after = np.flatnonzero(self[self.end :] != _NAN_BYTE)
        if after.size:
            return f"a write {after[0]} bytes past the end of"
        before = np.flatnonzero(self[: self.begin] != _NAN_BYTE)
        return (
            f"a write {self.begin - before[0]} bytes before the beginning of" if before.size else ""
        )


class _Launch(ctypes.Structure):
    """`emulator::Launch` of include/emulator/runtime.h."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("schedule", ctypes.c_int),
        ("seed", ctypes.c_ulonglong),
        ("first_block", ctypes.c_ulonglong),
        ("seconds", ctypes.c_double),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_ulonglong),
    ]


class Emulator:
    """The backend of emulated arrays.

    Attributes:
        schedule: The order in which threads and blocks run: one of `SCHEDULES`.
        seed: Of the random schedule.
        first_block: Where in a grid to start, for tests of grids too large to run as a whole.
        blocks_at_once: What `resident_blocks` says of every instance: few, so that grids that go by it have
            work for more than one turn.
        shared_bytes: Shared memory that a block may have.
        seconds: Time on the CPU after which a launch counts as hung; not watched under "thread".
        sanitizer: "", "address" or "thread", of the process: set by ``python -m tests.emulator``.
        folders: Where kernel sources and their headers are looked for.
    """

    def __init__(self) -> None:
        self.schedule = os.environ.get("LORAKIT_EMULATOR_SCHEDULE", "in_order")
        self.seed = int(os.environ.get("LORAKIT_EMULATOR_SEED", "0"))
        self.first_block = 0
        self.blocks_at_once = 4
        self.shared_bytes = _MOST_SHARED_BYTES
        self.seconds = float(os.environ.get("LORAKIT_EMULATOR_SECONDS", "60"))
        self.sanitizer = os.environ.get("LORAKIT_EMULATOR_SANITIZER", "")
        sources = os.environ.get("LORAKIT_EMULATOR_SOURCES")
        self.folders: tuple[Path, ...] = (
            Path(sources) if sources else REPOSITORY / "cuda_src",
            build.KERNELS,
        )
        self._libraries: dict[tuple[str, str, str, tuple[Path, ...]], ctypes.CDLL] = {}
        self._error_word: EmulatedArray | None = None
        self._one_at_a_time = threading.Lock()  # the runtime's state is global

    def resident_blocks(self, instance: Any) -> int:
        return self.blocks_at_once

    # ---- Arrays

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> EmulatedArray:
        """A new array of NaN bytes, so that what a kernel forgets to write shows; zeros above 1 GiB."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > _SPARSE_BYTES:
            return _sparse(shape, dtype, size)
        # NumPy allocates this much with malloc, without keeping freed memory for itself.
        memory = _Allocation(size + 2 * _GUARD_BYTES + _ALIGNMENT, np.uint8)
        memory.fill(_NAN_BYTE)
        address = memory.ctypes.data + _GUARD_BYTES
        memory.begin = _GUARD_BYTES + -address % _ALIGNMENT
        memory.end = memory.begin + size
        memory.poisoned = sanitizers.poison(memory.ctypes.data, memory.begin)
        sanitizers.poison(memory.ctypes.data + memory.end, memory.size - memory.end)
        return EmulatedArray(shape, dtype, buffer=memory, offset=memory.begin)

    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike) -> EmulatedArray:
        array = self.empty(shape, dtype)
        if array.nbytes <= _SPARSE_BYTES:
            array.fill(0)
        return array

    def full(self, shape: int | Sequence[int], dtype: DTypeLike, value: float) -> EmulatedArray:
        array = self.empty(shape, dtype)
        array.fill(value)
        return array

    def asarray(self, array: Any) -> EmulatedArray:
        """A copy on the device, its axes in the same order; emulated arrays pass as they are."""
        if isinstance(array, EmulatedArray):
            return array
        array = np.asarray(array)
        order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
        copy = self.empty([array.shape[axis] for axis in order], array.dtype)
        copy = copy.transpose(np.argsort(order))
        copy[...] = array
        return copy

    def error_word(self) -> EmulatedArray:
        """The sticky error word, uint32 [1]."""
        if self._error_word is None:
            self._error_word = self.zeros(1, np.uint32)
        return self._error_word

    def take_error(self) -> int:
        """Read and clear the error word."""
        bits = int(self.error_word()[0])
        self.error_word().fill(0)
        return bits

    # ---- Kernels

    @contextlib.contextmanager
    def scheduled(self, schedule: str, seed: int = 0) -> Iterator[None]:
        """Run threads and blocks in another order for a while."""
        before = self.schedule, self.seed
        self.schedule, self.seed = schedule, seed
        try:
            yield
        finally:
            self.schedule, self.seed = before

    def launch(self, instance: KernelInstance, grid: Sequence[int], args: Sequence[Any]) -> None:
        """Run a kernel instance to its end, compiling it first if needed.

        Args:
            instance: What to run: its ``threads`` are the block.
            grid: Blocks along x, y, z; missing ones are 1.
            args: `EmulatedArray` for a pointer, a NumPy scalar, an int for int32, a float
                for float32, None for a null pointer, `jit.Struct` for a struct.

        Raises:
            EmulatorError: The kernel does not compile, or a GPU would not run it to a defined end.
            TypeError: An argument does not fit the kernel's parameter.
            ValueError: The grid or the schedule is not valid.
        """
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        block = instance.threads if isinstance(instance.threads, tuple) else (instance.threads,)
        _check_sizes(instance.name, tuple(grid), block, instance.shared_bytes)
        library = self._library(instance)
        codes = library.emulator_signature().decode().split()
        if len(codes) != len(args):
            raise TypeError(f"{instance.name} takes {len(codes)} arguments, got {len(args)}")
        values = [
            _argument(instance.name, index, code, value)
            for index, (code, value) in enumerate(zip(codes, args, strict=True))
        ]
        error = ctypes.create_string_buffer(64 * 1024)
        launch = _Launch(
            instance.name.encode(),
            (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
            (ctypes.c_uint * 3)(*block, *(1,) * (3 - len(block))),
            instance.shared_bytes,
            SCHEDULES.index(self.schedule),
            self.seed,
            self.first_block,
            self.seconds,
            ctypes.cast(error, ctypes.c_char_p),
            len(error),
        )
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        with self._one_at_a_time:
            if not self.sanitizer:
                failed, report = library.emulator_launch(ctypes.byref(launch), pointers), ""
            else:
                with sanitizers.reports(library) as reports:
                    failed = library.emulator_launch(ctypes.byref(launch), pointers)
                report = reports[0]
        message = build.with_lines(error.value.decode()) if failed else _damage(instance.name, args)
        if message or report:
            raise EmulatorError(message or instance.name, report)

    def _library(self, instance: KernelInstance) -> ctypes.CDLL:
        key = (instance.source, instance.name, self.sanitizer, self.folders)
        library = self._libraries.get(key)
        if library is None:
            sanitizers.check_loaded(self.sanitizer)
            path = build.kernel_library(
                instance.source, instance.name, self.folders, self.sanitizer
            )
            library = self._libraries[key] = ctypes.CDLL(str(path))
            library.emulator_signature.restype = ctypes.c_char_p
        return library


def _sparse(shape: tuple[int, ...], dtype: DTypeLike, size: int) -> EmulatedArray:
    """An array of zeros whose pages exist once they are written to."""
    whole = size + 2 * _GUARD_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = _Allocation(whole, np.uint8, buffer=mmap.mmap(-1, whole, flags=flags))
    memory.begin, memory.end, memory.poisoned = _GUARD_BYTES, _GUARD_BYTES + size, False
    memory[: memory.begin] = memory[memory.end :] = _NAN_BYTE
    return EmulatedArray(shape, dtype, buffer=memory, offset=memory.begin)


def _check_sizes(
    kernel: str, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int
) -> None:
    """The limits of every GPU that lorakit runs on."""
    for sizes, what, limits in (
        (grid, "grid", (2**31 - 1, 65535, 65535)),
        (block, "block", (1024, 1024, 64)),
    ):
        fits = all(1 <= size <= limit for size, limit in zip(sizes, limits, strict=False))
        if not 1 <= len(sizes) <= 3 or not fits or (what == "block" and math.prod(sizes) > 1024):
            raise ValueError(f"{kernel}: a {what} of {sizes} cannot be launched")
    if shared_bytes > _MOST_SHARED_BYTES:
        raise ValueError(
            f"{kernel}: {shared_bytes} bytes of shared memory, a block has {_MOST_SHARED_BYTES}"
        )


def _argument(kernel: str, index: int, code: str, value: Any) -> np.ndarray[Any, Any]:
    """The bytes of one argument, checked against the kernel's parameter as no GPU would."""
    wanted = f"{kernel}: argument {index} must be {code.replace('*', 'an array of ')}"
    if value is None:
        value = np.uintp(0)
    elif type(value) in (bool, int, float):  # as lorakit.jit passes them to a GPU
        value = {bool: np.bool_, int: np.int32, float: np.float32}[type(value)](value)
    if isinstance(value, jit.Struct):
        packed = value.packed(lambda array: int(array.ctypes.data) if array.size else 0)
        if code != f"struct{packed.itemsize}":
            raise TypeError(f"{wanted}, got a struct of {packed.itemsize} bytes")
        return packed
    if code.startswith("*"):
        if isinstance(value, np.uintp) and value == 0:
            return np.zeros(1, np.uintp)
        if not isinstance(value, EmulatedArray):
            raise TypeError(f"{wanted} on the emulated device, got {type(value).__name__}")
        if not _fits(code[1:], value.dtype):
            raise TypeError(f"{wanted}, got {value.dtype}")
        # As on a GPU, an empty array has no address.
        return np.array([value.ctypes.data if value.size else 0], np.uintp)
    if not isinstance(value, np.generic) or not _fits(code, value.dtype):
        raise TypeError(f"{wanted}, got {type(value).__name__}")
    return np.array([value])


def _fits(code: str, dtype: np.dtype[Any]) -> bool:
    """Integers of one size pass for each other, signed or not."""
    return code == "?" or dtype.name in (code, f"u{code}")


def _damage(kernel: str, args: Sequence[Any]) -> str:
    """A message about the first array whose surroundings a kernel wrote to, or an empty string."""
    flat = [
        (i, v)
        for i, arg in enumerate(args)
        for v in (arg if isinstance(arg, jit.Struct) else (arg,))
    ]
    for index, value in flat:
        while isinstance(value, np.ndarray):
            if isinstance(value, _Allocation):
                damage = value.damage()
                if damage:
                    value[: value.begin] = value[value.end :] = _NAN_BYTE
                    return f"{kernel}: {damage} the array of argument {index}"
                break
            value = value.base
    return ""


emulator = Emulator()
EmulatedArray.lorakit_backend = emulator
