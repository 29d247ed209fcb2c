"""Where kernels run: one test, two backends, the GPU or the emulator, by what there is or by option."""

from __future__ import annotations

import functools
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lorakit import errors, jit
from lorakit.nn import DeviceRef, PagedKVCacheCollection
from lorakit.testing import PagedCache
from tests import kernel_table
from tests.emulator import EmulatorError, agreement, build, emulator
from tests.emulator.agreement import Twice, Written


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        choices=("auto", "gpu", "emulator"),
        default="auto",
        help="where kernel tests run: the GPU if there is one, else the emulator (auto)",
    )
    parser.addoption(
        "--twice",
        action="store_true",
        help="kernels that tests launch on the GPU run on the emulator too, and must agree",
    )
    parser.addoption(
        "--no-memory-pool",
        action="store_true",
        help="every GPU array is an allocation of its own, as compute-sanitizer needs it",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-memory-pool"):
        jit.import_cupy().cuda.set_allocator(None)


@functools.cache
def has_gpu() -> bool:
    try:
        return int(jit.import_cupy().cuda.runtime.getDeviceCount()) > 0
    except Exception:
        return False


def pytest_report_header(config: pytest.Config) -> str:
    return f"lorakit: kernel tests run on {kernel_place(config)}"


def kernel_place(config: pytest.Config) -> str:
    """`gpu`, `emulator`, or why there is neither."""
    chosen = config.getoption("--kernels")
    if chosen == "auto":
        chosen = "gpu" if has_gpu() else "emulator"
    if chosen == "emulator":
        if shutil.which(build.compiler()) is None:
            return f"nothing: no GPU, and no {build.compiler()} for the emulator"
        try:
            build.cuda_include()
        except EmulatorError as error:
            return f"nothing: no GPU, and for the emulator: {error}"
    return str(chosen)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Layers are tested on the CPU, and on the GPU where there is one."""
    if "device" in metafunc.fixturenames:
        devices = [DeviceRef.CPU()]
        if metafunc.config.getoption("--kernels") != "emulator" and has_gpu():
            devices.append(DeviceRef.GPU())
        metafunc.parametrize("device", devices, ids=str)


class KernelDevice:
    """A place that runs kernels."""

    def __init__(self, name: str, *, twice: bool = False) -> None:
        self.name = name
        self.is_slow = name == "emulator" or twice
        self.backend: Any = emulator if name == "emulator" else jit.cupy_backend(0)

    def asarray(self, array: Any) -> Any:
        """A copy on the device, of the same strides order (C)."""
        return self.backend.asarray(np.ascontiguousarray(array))

    def cache(self, cache: PagedCache) -> PagedKVCacheCollection:
        """A copy of a cache on the device."""
        return PagedKVCacheCollection(
            self.asarray(cache.blocks),
            self.asarray(cache.cache_lengths),
            self.asarray(cache.lookup_table),
            cache.max_lengths,
        )

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        return np.array(array) if self.name == "emulator" else array.get()

    def take_errors(self) -> str:
        """What `lorakit.check_errors` says now; the empty string if nothing."""
        if self.name == "emulator":
            bits = int(self.backend.error_word()[0])
            self.backend.error_word()[0] = 0
            return "; ".join(text for bit, text in errors.MEANINGS.items() if bits & bit)
        try:
            errors.check_errors()
        except errors.DeviceValueError as error:
            return str(error)
        return ""


@pytest.fixture
def kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelDevice]:
    """The place that runs kernels; a test that leaves an error behind unread fails."""
    place = kernel_place(request.config)
    if place not in ("gpu", "emulator"):
        pytest.skip(place)
    twice = place == "gpu" and request.config.getoption("--twice")
    device = KernelDevice(place, twice=twice)
    device.take_errors()
    if twice:
        both = Twice(device.backend)
        monkeypatch.setattr(device.backend, "launch", both.launch)
        monkeypatch.setattr(device.backend, "empty", both.empty)
        request.node.user_properties.append(("written", both.written))
    yield device
    assert device.take_errors() == ""


@pytest.fixture
def to_device(device: DeviceRef) -> Callable[[np.ndarray[Any, Any]], Any]:
    """A NumPy array as an array on the device."""

    def convert(array: np.ndarray[Any, Any]) -> Any:
        if device.is_cpu():
            return array
        cupy = jit.import_cupy()
        with cupy.cuda.Device(device.id):
            return cupy.asarray(array)

    return convert


@pytest.fixture
def to_host() -> Callable[[Any], np.ndarray[Any, Any]]:
    """An array of any device as NumPy array."""
    return lambda array: array if isinstance(array, np.ndarray) else array.get()


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Any:
    """CuPy, for what only a GPU can show."""
    if request.config.getoption("--kernels") == "emulator" or not has_gpu():
        pytest.skip("needs a GPU")
    return jit.import_cupy()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name only."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What only a GPU could have shown, and what the compiled kernels take."""
    missed: Counter[str] = Counter()
    for report in terminalreporter.getreports("skipped"):
        if isinstance(report.longrepr, tuple) and "needs a GPU" in report.longrepr[2]:
            missed[report.nodeid.partition("::")[0]] += 1
    if missed:
        files = ", ".join(f"{path} ({count})" for path, count in sorted(missed.items()))
        terminalreporter.write_line(f"not run: {missed.total()} tests that need a GPU: {files}")

    written = [
        Written(*row)
        for report in terminalreporter.getreports("passed")
        for name, rows in report.user_properties
        if name == "written"
        for row in rows
    ]
    if written:
        terminalreporter.section("written by the GPU and by the emulator")
        terminalreporter.write_line(agreement.table(written))

    rows = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "kernel"
    ]
    cache: Any = getattr(terminalreporter.config, "cache", None)
    if rows and (cache is None or os.environ.get("CI")):  # on CI to the terminal, else to a file
        terminalreporter.section("registers and shared memory")
        terminalreporter.write_line(kernel_table.table(rows))
    elif rows:
        path = cache.mkdir("kernels") / "table.txt"
        path.write_text(kernel_table.table(rows) + "\n")
        terminalreporter.write_line(f"registers and shared memory of each kernel: {path}")
