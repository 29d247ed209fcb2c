"""The only place that compiles and launches kernels.

A kernel is compiled at its first launch from the CUDA sources that ship with lorakit, by NVRTC through
`cupy.RawModule`, and kept in CuPy's cache on disk, so that a second process compiles nothing. The program
given to NVRTC is two lines: a digest of all sources, because CuPy's cache key does not see included
headers, and one include, so that messages name the real file and line.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lorakit import driver

if TYPE_CHECKING:
    from lorakit.tiles import Instance

MINIMUM_COMPUTE_CAPABILITY = 80

_BACKENDS: dict[int, CupyBackend] = {}
_BACKENDS_LOCK = threading.Lock()


class KernelCompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log, with file and line."""


class Backend(Protocol):
    """What an op needs of the place where its arrays live."""

    @property
    def shared_bytes(self) -> int: ...
    def empty(self, shape: Sequence[int], dtype: Any) -> Any: ...
    def zeros(self, shape: Sequence[int], dtype: Any) -> Any: ...
    def full(self, shape: Sequence[int], dtype: Any, value: int) -> Any: ...
    def asarray(self, array: Any) -> Any: ...
    def error_word(self) -> Any: ...
    def resident_blocks(self, instance: Instance) -> int: ...
    def launch(self, instance: Instance, grid: Sequence[int], args: Sequence[Any]) -> None: ...


def is_host(array: Any) -> bool:
    """True for plain NumPy arrays: their values can be checked, and ops on them run the reference."""
    return isinstance(array, np.ndarray) and not hasattr(type(array), "lorakit_backend")


def place_of(array: Any) -> str:
    """Where an array lives, in words: "the CPU", "GPU 0"."""
    if isinstance(array, np.ndarray):
        return "the CPU" if is_host(array) else "the emulator"
    if type(array).__module__.partition(".")[0] == "cupy":
        return f"GPU {array.device.id}"
    raise TypeError(
        f"expected a NumPy or CuPy array, got {type(array).__module__}.{type(array).__name__}"
    )


def backend_of(array: Any) -> Backend | None:
    """The backend that runs kernels on this array, or None where the reference runs (plain NumPy)."""
    if isinstance(array, np.ndarray):
        return getattr(type(array), "lorakit_backend", None)
    place_of(array)
    return cupy_backend(array.device.id)


# ---- Sources and options -----------------------------------------------------------------------------


@functools.cache
def sources() -> Path:
    """The folder of the CUDA sources: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "common" / "types.cuh").is_file():
            return folder
    raise FileNotFoundError(f"the CUDA sources of lorakit are neither in {package} nor beside it")


@functools.cache
def source_digest() -> str:
    """A digest of every CUDA source and header, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(sources().rglob("*.cu*")):
        digest.update(str(path.relative_to(sources())).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def program(source: str) -> str:
    """All that NVRTC is given: the digest and one include."""
    return f"// cuda_src {source_digest()}\n#include <{source}>\n"


def options(compute_capability: int) -> tuple[str, ...]:
    """NVRTC's options for a device; ``sm_90a`` unlocks Hopper's own instructions.

    Raises:
        RuntimeError: The device is older than compute capability 8.0.
    """
    if compute_capability < MINIMUM_COMPUTE_CAPABILITY:
        raise RuntimeError(
            "lorakit's kernels need compute capability 8.0 or newer, got "
            f"{compute_capability // 10}.{compute_capability % 10}"
        )
    common = ("-std=c++17", f"-I{sources()}")
    return (*common, "--gpu-architecture=sm_90a") if compute_capability == 90 else common


def compile_cubin(source: str, names: Sequence[str], arch: str) -> tuple[bytes, str]:
    """Compile instances for any architecture, without a GPU, as `cupy.RawModule` would on one.

    Args:
        source: A file in ``cuda_src``.
        names: C++ name expressions to instantiate.
        arch: For example ``sm_90a``.

    Returns:
        The cubin, and ptxas' report: registers, spills and warnings of each kernel.

    Raises:
        KernelCompileError: With NVRTC's log.
    """
    import_cupy()
    from cupy._core.core import assemble_cupy_compiler_options  # the include folders RawModule adds
    from cupy.cuda import nvrtc

    flags = assemble_cupy_compiler_options(("-std=c++17", f"-I{sources()}"))
    flags += ("-ftz=true", f"--gpu-architecture={arch}", "--ptxas-options=-v")
    if nvrtc.getVersion() >= (12, 9):  # what it takes from its cache comes without ptxas' report
        flags += ("--no-cache",)
    handle = nvrtc.createProgram(program(source), f"program_{source}", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(handle, name)
        try:
            nvrtc.compileProgram(handle, flags)
        except nvrtc.NVRTCError as error:
            raise _compile_error(source, names, nvrtc.getProgramLog(handle)) from error
        return nvrtc.getCUBIN(handle), nvrtc.getProgramLog(handle)
    finally:
        nvrtc.destroyProgram(handle)


def _compile_error(source: str, names: Sequence[str], log: str) -> KernelCompileError:
    return KernelCompileError(
        f"NVRTC could not compile {len(names)} instance(s), {names[0]} first, from {source}:\n{log}"
    )


# ---- CuPy --------------------------------------------------------------------------------------------


@functools.cache
def import_cupy() -> Any:
    """CuPy; with a temporary cache folder if its own cannot be made or written, on which it would fail."""
    folder = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written")
    except OSError as error:
        os.environ["CUPY_CACHE_DIR"] = tempfile.mkdtemp(prefix="lorakit-cupy-cache-")
        warnings.warn(f"kernels are cached for this process only: {error}", stacklevel=2)
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a GPU needs CuPy: install lorakit with the extra cuda12 or cuda13"
        ) from error
    return cupy


def cupy_backend(device_id: int) -> CupyBackend:
    """The backend of one GPU, the same for all threads: it has the error word."""
    with _BACKENDS_LOCK:
        if device_id not in _BACKENDS:
            _BACKENDS[device_id] = CupyBackend(device_id)
        return _BACKENDS[device_id]


class CupyBackend:
    """Allocates and launches on one GPU, on CuPy's current stream."""

    def __init__(self, device_id: int) -> None:
        self._cupy = import_cupy()
        self._device_id = device_id
        self._functions: dict[Instance, Any] = {}
        self._resident_blocks: dict[Instance, int] = {}
        self._error_word: Any = None

    @property
    def _device(self) -> Any:
        """Makes this GPU the current one; a new object each time, as threads cannot share one."""
        return self._cupy.cuda.Device(self._device_id)

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        with self._device:
            return self._cupy.empty(shape, dtype)

    def zeros(self, shape: Sequence[int], dtype: Any) -> Any:
        with self._device:
            return self._cupy.zeros(shape, dtype)

    def full(self, shape: Sequence[int], dtype: Any, value: int) -> Any:
        with self._device:
            return self._cupy.full(shape, value, dtype)

    def asarray(self, array: Any) -> Any:
        """On this GPU; host arrays are copied, device arrays pass as they are.

        Raises:
            RuntimeError: A host array during a capture: every replay would use what it holds now.
        """
        with self._device:
            if is_host(array) and self._cupy.cuda.get_current_stream().is_capturing():
                raise RuntimeError(
                    "arrays must be on the GPU while a graph is captured, got a NumPy array"
                )
            return self._cupy.asarray(array)

    def error_word(self) -> Any:
        """The sticky error word, a uint32 array of one element."""
        if self._error_word is None:
            # On a stream of its own: were it cleared on a stream that captures, every replay would clear it.
            with self._device, self._cupy.cuda.Stream(non_blocking=True) as stream:
                word = self._cupy.zeros(1, np.uint32)
                stream.synchronize()
            self._error_word = word
        return self._error_word

    def take_error(self) -> int:
        """Read and clear the error word, after the work queued so far."""
        if self._error_word is None:
            return 0
        with self._device:
            self._device.synchronize()
            bits = int(self._error_word.get()[0])
            if bits:
                self._error_word.fill(0)
                self._device.synchronize()
        return bits

    def launch(self, instance: Instance, grid: Sequence[int], args: Sequence[Any]) -> None:
        """Launch an instance; it is compiled, or taken from the cache on disk, the first time."""
        with self._device:
            function = self._function(instance)
            if instance.early and self._compute_capability >= 90:
                stream = self._cupy.cuda.get_current_stream().ptr
                driver.launch_early(function.kernel.ptr, instance, grid, args, stream)
                return
            function(
                tuple(grid),
                (instance.threads,),
                tuple(narrow(arg) for arg in args),
                shared_mem=instance.shared_bytes,
            )

    def resident_blocks(self, instance: Instance) -> int:
        """Blocks of an instance that run at the same time.

        Raises:
            RuntimeError: Not even one fits on this GPU.
        """
        blocks = self._resident_blocks.get(instance)
        if blocks is None:
            with self._device:
                each = self._cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
                    self._function(instance).kernel.ptr, instance.threads, instance.shared_bytes
                )
            if not each:
                raise RuntimeError(
                    f"{instance.name} does not run on GPU {self._device_id}: a block of {instance.threads} "
                    f"threads and {instance.shared_bytes} bytes of shared memory does not fit"
                )
            blocks = each * int(self._device.attributes["MultiProcessorCount"])
            self._resident_blocks[instance] = blocks
        return blocks

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Shared memory that a block may have."""
        return int(self._device.attributes["MaxSharedMemoryPerBlockOptin"])

    @functools.cached_property
    def _compute_capability(self) -> int:
        return int(self._device.compute_capability)

    def _function(self, instance: Instance) -> Any:
        function = self._functions.get(instance)
        if function is None:
            function = self._functions[instance] = self._load(instance)
        return function

    def _load(self, instance: Instance) -> Any:
        flags = options(self._compute_capability)
        try:
            function = self._compile(instance, flags)
        except OSError as error:  # the cache on disk cannot be written
            warnings.warn(f"{instance.name} is cached for this process only: {error}", stacklevel=2)
            before = os.environ.get("CUPY_CACHE_IN_MEMORY")
            os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
            try:
                function = self._compile(instance, flags)
            finally:
                del os.environ["CUPY_CACHE_IN_MEMORY"]
                if before is not None:
                    os.environ["CUPY_CACHE_IN_MEMORY"] = before
        if instance.shared_bytes > 48 * 1024:  # more has to be asked for
            function.max_dynamic_shared_size_bytes = instance.shared_bytes
        return function

    def _compile(self, instance: Instance, flags: tuple[str, ...]) -> Any:
        module = self._cupy.RawModule(
            code=program(instance.source), options=flags, name_expressions=(instance.name,)
        )
        try:
            return module.get_function(instance.name)
        except self._cupy.cuda.compiler.CompileException as error:
            raise _compile_error(instance.source, (instance.name,), str(error)) from error


class Struct(tuple[Any, ...]):
    """A kernel argument passed by value: a C++ struct of pointers and ``long long``, all of 8 bytes."""

    def packed(self, address: Callable[[Any], int]) -> NDArray[np.void]:
        """One element that holds the members; `address` gives that of an array."""
        members = [0 if m is None else m if isinstance(m, int) else address(m) for m in self]
        return np.array(members, np.int64).view(f"V{8 * len(members)}")


def narrow(value: Any) -> Any:
    """A kernel argument: int to int32 (`OverflowError` outside), float to float32, None to a null pointer.

    CuPy would pass a Python int as 64 bits and a Python float as a double, whatever the kernel declares.
    NumPy scalars, but for float64, which is a Python float, and arrays pass as they are.
    """
    if value is None:
        return np.uintp(0)
    if isinstance(value, Struct):
        return value.packed(lambda array: int(array.data.ptr))
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int32(value)
    if isinstance(value, float):
        return np.float32(value)
    return value


# ---- Errors seen on a device ---------------------------------------------------------------------------


def take_errors() -> Iterator[tuple[str, int]]:
    """The error bits of each GPU that ran a kernel, read and cleared; it waits for queued work."""
    for device_id, backend in sorted(_BACKENDS.items()):
        yield f"GPU {device_id}", backend.take_error()
