"""Compiles the emulator's runtime and kernel instances with g++, each once.

Libraries are kept in the folder ``$LORAKIT_EMULATOR_CACHE``. A library's name holds a digest of all
that goes into it, and it appears by a rename: processes (pytest-xdist) can share the folder.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"
KERNELS = HERE / "kernels"

# DWARF 4: addr2line of binutils 2.40 gives wrong file names for version 5.
COMMON_FLAGS = ("-std=c++17", "-gdwarf-4", "-fPIC", "-shared", "-fvisibility=hidden")
# The runtime is never instrumented. Its loops must stay loops: as calls of memset and memcpy,
# sanitizers would check them.
RUNTIME_FLAGS = (*COMMON_FLAGS, "-O2", "-Wall", "-Wextra", "-fno-tree-loop-distribute-patterns")
# Kernels reinterpret vectors. Static shared memory is made of function-local statics; those of
# templates must not be shared between libraries (-fno-gnu-unique).
KERNEL_FLAGS = (
    *COMMON_FLAGS,
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-gnu-unique",
)
# What AddressSanitizer or a fault shows anyway is left out of UBSan, and checks are calls: unrolled
# loops compile three times as fast.
SANITIZER_FLAGS: dict[str, tuple[str, ...]] = {
    "": (),
    "address": (
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size,vptr",
        "-fsanitize-sections=emulator_shared",
        "-fsanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ),
    "thread": ("-fsanitize=thread",),
}


class EmulatorError(RuntimeError):
    """A kernel that does not compile or did something that a GPU would not forgive.

    Attributes:
        report: What the sanitizers said, if anything.
    """

    def __init__(self, message: str, report: str = "") -> None:
        super().__init__(f"{message}\n{report}" if report else message)
        self.report = report


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def compiler_version() -> str:
    command = [compiler(), "--version"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=clean_environment()
    ).stdout


def clean_environment() -> dict[str, str]:
    """For tools: without the sanitizer that this process may run under."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


@functools.cache
def cache_folder() -> Path:
    """Where libraries are kept."""
    default = Path(tempfile.gettempdir()) / f"lorakit-emulator-{os.getuid()}"
    folder = Path(os.environ.get("LORAKIT_EMULATOR_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def cuda_include() -> Path:
    """The folder of NVIDIA's ``cuda_fp16.h`` and ``cuda_bf16.h``: their wheel's, or a toolkit's.

    Raises:
        EmulatorError: Neither is installed.
    """
    candidates: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        candidates += [
            Path(location) / "cuda_runtime" / "include",
            Path(location) / "cu13" / "include",
        ]
    if "CUDA_PATH" in os.environ:
        candidates.append(Path(os.environ["CUDA_PATH"]) / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    for folder in candidates:
        if (folder / "cuda_bf16.h").is_file():
            return folder
    raise EmulatorError(
        "NVIDIA's cuda_bf16.h was not found; install nvidia-cuda-runtime-cu12 or set CUDA_PATH"
    )


def runtime_library() -> Path:
    """The emulator's runtime, compiled when it is not in the cache."""
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    inputs = (*sources, *(HERE / "runtime").glob("*.h"), *INCLUDE.rglob("*.h"))
    command = [
        compiler(),
        *RUNTIME_FLAGS,
        f"-I{INCLUDE}",
        f"-I{cuda_include()}",
        *map(str, sources),
    ]
    return _library("runtime", command, inputs, "")


def kernel_library(source: str, name: str, folders: Sequence[Path], sanitizer: str = "") -> Path:
    """One kernel instance, compiled when it is not in the cache.

    Args:
        source: The file that holds the kernel, in the first of ``folders`` that has it.
        name: A C++ name expression, for example ``lorakit::sgmv_shrink_kernel<__half, 64, true>``.
        folders: Where sources and their headers are looked for.
        sanitizer: "", "address" (with UBSan) or "thread".

    Raises:
        EmulatorError: The file does not exist or does not compile; the message is the compiler's.
    """
    path = next((folder / source for folder in folders if (folder / source).is_file()), None)
    if path is None:
        raise EmulatorError(f"{source} is not in {', '.join(map(str, folders))}")
    runtime = runtime_library()
    shim = f"#include <emulator/launcher.h>\n#include <{source}>\nEMULATOR_KERNEL({name})\n"
    headers = [header for folder in folders for header in folder.rglob("*.cuh")]
    inputs = (path, *headers, *(file for file in INCLUDE.rglob("*") if file.is_file()))
    command = [
        compiler(),
        *KERNEL_FLAGS,
        *os.environ.get("LORAKIT_EMULATOR_OPTIMIZATION", "-O1").split(),
        *SANITIZER_FLAGS[sanitizer],
        *(f"-I{folder}" for folder in (INCLUDE, *folders, cuda_include())),
    ]
    return _library(Path(source).stem, command, inputs, shim, link=(str(runtime),))


def _library(
    stem: str,
    command: Sequence[str],
    inputs: Iterable[Path],
    program: str,
    link: Sequence[str] = (),
) -> Path:
    """The library that a command makes, with ``program`` as one more source if there is one."""
    digest = hashlib.sha256(repr((command, link, program, compiler_version())).encode())
    for path in sorted(set(inputs)):
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    library = cache_folder() / f"{stem}-{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    # The program is kept beside the library, for a debugger to show.
    shim = library.with_suffix(".cpp")
    if program:
        _write(shim, program)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        output = Path(folder) / library.name
        # The library after the source that needs it, as the linker demands.
        full = [*command, *((str(shim),) if program else ()), *link, "-o", str(output)]
        result = subprocess.run(full, capture_output=True, text=True, env=clean_environment())
        if result.returncode != 0:
            raise EmulatorError(f"{shlex.join(full)}\n{program}{result.stderr}")
        output.replace(library)
    return library


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


# How sanitizers and the emulator name code in a library: a path, or a file name, and an offset.
_ADDRESS = re.compile(r"(<null> <null> )?\((?:\S*/)?(?P<library>[\w-]+\.so)\+(?P<at>0x[0-9a-f]+)\)")


def with_lines(text: str) -> str:
    """The text with functions and source lines in place of addresses in kernels."""

    def look_up(match: re.Match[str]) -> str:
        library = cache_folder() / match["library"]
        if not library.exists():
            return match[0]
        command = ["addr2line", "-e", str(library), "-fCip", match["at"]]
        result = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
        return result.stdout.strip() or match[0]

    return _ADDRESS.sub(look_up, text)
