"""How kernels are compiled, kept and given their arguments; what needs a GPU comes last."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from lorakit import jit, tiles
from lorakit.dtypes import STORAGE

INSTANCE = tiles.store_kv(np.float32)

needs_cupy = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="needs CuPy: pip install '.[test-cpu]'"
)


@pytest.fixture
def own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the CUDA sources that a test may change, in place of the real ones."""
    folder = tmp_path / "cuda_src"
    shutil.copytree(jit.sources(), folder)
    monkeypatch.setattr(jit, "sources", lambda: folder)
    jit.source_digest.cache_clear()
    yield folder
    jit.source_digest.cache_clear()


def fresh_digest() -> str:
    jit.source_digest.cache_clear()
    return jit.source_digest()


# ---- Sources, digest, program ----------------------------------------------------------------------


def test_digest_follows_every_source(own_sources: Path) -> None:
    """A change anywhere below the folder makes a new program: CuPy's cache key sees only its text."""
    seen = {fresh_digest()}
    for path in sorted(own_sources.rglob("*.cu*")):
        path.write_text(path.read_text() + "\n")
        assert fresh_digest() not in seen, path
        seen.add(fresh_digest())


def test_digest_follows_names(own_sources: Path) -> None:
    before = fresh_digest()
    (own_sources / "rope.cu").rename(own_sources / "rotary.cu")
    renamed = fresh_digest()
    (own_sources / "common" / "extra.cuh").write_text("")
    assert len({before, renamed, fresh_digest()}) == 3


def test_digest_is_of_text_and_not_of_place(own_sources: Path) -> None:
    copied = fresh_digest()
    os.utime(own_sources / "rope.cu", (0, 0))
    (own_sources / "notes.txt").write_text("no source")
    assert fresh_digest() == copied


def test_program_is_a_digest_and_an_include() -> None:
    lines = jit.program("sgmv_shrink.cu").splitlines()
    assert lines == [f"// cuda_src {jit.source_digest()}", "#include <sgmv_shrink.cu>"]


def test_sources_beside_the_package_or_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout has them beside the package, a wheel inside it; an installed copy wins over others."""
    find = jit.sources.__wrapped__
    package = tmp_path / "lorakit"
    package.mkdir()
    monkeypatch.setattr(jit, "__file__", str(package / "jit.py"))
    with pytest.raises(FileNotFoundError, match=r"neither in .*lorakit nor beside it"):
        find()
    shutil.copytree(jit.sources(), tmp_path / "cuda_src")
    assert find() == tmp_path / "cuda_src"
    shutil.copytree(jit.sources(), package / "cuda_src")
    assert find() == package / "cuda_src"


# ---- Options -----------------------------------------------------------------------------------------


def test_options_per_device() -> None:
    common = ("-std=c++17", f"-I{jit.sources()}")
    for capability in (80, 86, 89, 100, 120):
        assert jit.options(capability) == common
    assert jit.options(90) == (*common, "--gpu-architecture=sm_90a")


@pytest.mark.parametrize(("capability", "text"), [(75, "7.5"), (70, "7.0"), (61, "6.1")])
def test_old_devices_are_refused(capability: int, text: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        jit.options(capability)
    assert str(caught.value) == (
        f"lorakit's kernels need compute capability 8.0 or newer, got {text}"
    )


# ---- Arguments ---------------------------------------------------------------------------------------


def test_narrow() -> None:
    """CuPy passes a Python int as 64 bits and a float as a double; kernels declare int and float."""
    for value, wanted in (
        (7, np.int32(7)),
        (-(2**31), np.int32(-(2**31))),
        (2**31 - 1, np.int32(2**31 - 1)),
        (0.1, np.float32(0.1)),
        (True, np.bool_(True)),
        (None, np.uintp(0)),
        (np.int64(2**40), np.int64(2**40)),
        (np.float64(0.5), np.float32(0.5)),
    ):
        got = jit.narrow(value)
        assert (type(got), got) == (type(wanted), wanted)
    array = np.zeros(3)
    assert jit.narrow(array) is array


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**63])
def test_narrow_refuses_what_does_not_fit(value: int) -> None:
    with pytest.raises(OverflowError):
        jit.narrow(value)


# ---- Where an array lives ----------------------------------------------------------------------------


def test_host_arrays_have_no_backend() -> None:
    assert jit.backend_of(np.zeros(2)) is None
    assert jit.is_host(np.zeros(2))
    assert jit.place_of(np.zeros(2)) == "the CPU"


def test_emulated_arrays_have_theirs() -> None:
    from tests.emulator import emulator

    array = emulator.asarray(np.zeros(2, np.float32))
    assert jit.backend_of(array) is emulator
    assert not jit.is_host(array)
    assert jit.place_of(array) == "the emulator"


def test_other_arrays_are_refused() -> None:
    with pytest.raises(TypeError) as caught:
        jit.backend_of([1.0])
    assert str(caught.value) == "expected a NumPy or CuPy array, got builtins.list"


# ---- Compiling ---------------------------------------------------------------------------------------


@needs_cupy
def test_compile_error_shows_file_and_line(own_sources: Path) -> None:
    path = own_sources / "kv_cache.cu"
    text = path.read_text()
    path.write_text(text + '\nstatic_assert(sizeof(int) == 5, "int has five bytes");\n')
    line = text.count("\n") + 2
    with pytest.raises(jit.KernelCompileError) as caught:
        jit.compile_cubin("kv_cache.cu", [INSTANCE.name], "sm_80")
    message = str(caught.value)
    assert message.startswith(
        f"NVRTC could not compile 1 instance(s), {INSTANCE.name} first, from kv_cache.cu:\n"
    )
    assert f"{path}({line}): error" in message
    assert "int has five bytes" in message


@needs_cupy
def test_a_kernel_that_does_not_exist() -> None:
    with pytest.raises(jit.KernelCompileError, match="no_such_kernel"):
        jit.compile_cubin("kv_cache.cu", ["lorakit::no_such_kernel<float>"], "sm_80")


@needs_cupy
def test_headers_that_include_each_other(own_sources: Path) -> None:
    """`#pragma once` ends the circle: it compiles."""
    common = own_sources / "common"
    (common / "one.cuh").write_text("#pragma once\n#include <common/two.cuh>\n")
    (common / "two.cuh").write_text("#pragma once\n#include <common/one.cuh>\n")
    path = own_sources / "kv_cache.cu"
    path.write_text("#include <common/one.cuh>\n" + path.read_text())
    assert jit.compile_cubin("kv_cache.cu", [INSTANCE.name], "sm_80")[0]


@needs_cupy
def test_import_with_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    """CuPy would fail at import. A path below a file cannot be made by anyone, root included."""
    (tmp_path / "file").write_text("")
    script = "from lorakit import jit; print(jit.import_cupy().__name__, jit.os.environ['CUPY_CACHE_DIR'])"
    result = run(script, tmp_path / "file" / "cache")
    name, folder = result.stdout.split()
    assert name == "cupy"
    assert Path(folder).is_dir()
    assert "kernels are cached for this process only" in result.stderr


class FakeCupy:
    """As much of CuPy as a launch needs, with a cache on disk that cannot be written."""

    CompileException = type("CompileException", (Exception,), {})

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.compiled_in_memory: list[bool] = []
        self.cuda = SimpleNamespace(
            Device=FakeDevice, compiler=SimpleNamespace(CompileException=self.CompileException)
        )

    def RawModule(self, code: str, options: tuple[str, ...], name_expressions: Any) -> FakeCupy:
        return self

    def get_function(self, name: str) -> Any:
        in_memory = os.environ.get("CUPY_CACHE_IN_MEMORY") == "1"
        self.compiled_in_memory.append(in_memory)
        if not in_memory:
            raise PermissionError("read-only file system")
        return lambda *args, **keywords: self.launched.append((args, keywords))


class FakeDevice:
    compute_capability = "90"
    attributes: ClassVar = {"MultiProcessorCount": 132}

    def __init__(self, device_id: int) -> None:
        pass

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("before", [None, "0"])
def test_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """The kernel is compiled for this process, once, with a warning, and CuPy's switch is put back."""
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    if before is not None:
        monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", before)
    fake = FakeCupy()
    monkeypatch.setattr(jit, "import_cupy", lambda: fake)
    backend = jit.CupyBackend(0)
    with pytest.warns(UserWarning, match="cached for this process only: read-only file system"):
        backend.launch(INSTANCE, (1,), (3, 0.5))
    backend.launch(INSTANCE, (2,), (4, None))
    assert fake.compiled_in_memory == [False, True]
    assert os.environ.get("CUPY_CACHE_IN_MEMORY") == before
    (first, _), (second, _) = fake.launched
    assert first == ((1,), (INSTANCE.threads,), (np.int32(3), np.float32(0.5)))
    assert second == ((2,), (INSTANCE.threads,), (np.int32(4), np.uintp(0)))


def backend_with_occupancy(
    monkeypatch: pytest.MonkeyPatch, occupancy: Callable[..., int]
) -> jit.CupyBackend:
    """Of a driver that says so; it knows one kernel, as 7."""
    fake = FakeCupy()
    fake.cuda.driver = SimpleNamespace(occupancyMaxActiveBlocksPerMultiprocessor=occupancy)
    loaded = SimpleNamespace(kernel=SimpleNamespace(ptr=7))
    monkeypatch.setattr(jit, "import_cupy", lambda: fake)
    monkeypatch.setattr(jit.CupyBackend, "_load", lambda *_: loaded)
    return jit.CupyBackend(0)


def test_resident_blocks_are_those_of_all_multiprocessors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the driver says of one, for this kernel, its threads and its shared memory; asked once."""
    asked: list[tuple[int, ...]] = []

    def occupancy(*of: int) -> int:
        asked.append(of)
        return 3

    backend = backend_with_occupancy(monkeypatch, occupancy)
    instance = replace(INSTANCE, shared_bytes=5000)
    assert [backend.resident_blocks(instance) for _ in range(2)] == [3 * 132] * 2
    assert asked == [(7, INSTANCE.threads, 5000)]


def test_an_instance_of_which_no_block_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_with_occupancy(monkeypatch, lambda *_: 0)
    with pytest.raises(RuntimeError) as caught:
        backend.resident_blocks(INSTANCE)
    assert str(caught.value) == (
        f"{INSTANCE.name} does not run on GPU 0: a block of {INSTANCE.threads} threads and "
        f"{INSTANCE.shared_bytes} bytes of shared memory does not fit"
    )


# ---- Processes: with a GPU only ------------------------------------------------------------------------

LAUNCH = """
import json, time
from lorakit import jit, testing
from lorakit.nn import PagedKVCacheCollection
import numpy as np, lorakit

calls = []
cupy = jit.import_cupy()
compile_module = cupy.cuda.compiler._compile_using_nvrtc_no_warning
cupy.cuda.compiler._compile_using_nvrtc_no_warning = (
    lambda source, *args: calls.append(source) or compile_module(source, *args))

rng = np.random.default_rng(0)
cache = testing.paged_cache([3], [2], page_size=4, n_kv_heads=1, head_dim=8, dtype=np.float32, rng=rng,
                            store_new=False)
collection = PagedKVCacheCollection(cupy.asarray(cache.blocks), cupy.asarray(cache.cache_lengths),
                                    cupy.asarray(cache.lookup_table), cache.max_lengths)
new = rng.standard_normal((2, 1, 8)).astype(np.float32)
offsets = np.array([0, 2], np.uint32)
begin = time.perf_counter()
lorakit.ops.store_kv(cupy.asarray(new), cupy.asarray(new), offsets, collection, 0)
cupy.cuda.Device().synchronize()
seconds = time.perf_counter() - begin
lorakit.ops.store_kv(new, new, offsets, cache, 0)
assert np.array_equal(collection.blocks.get(), cache.blocks, equal_nan=True)
print(json.dumps({"compiled": sum("cuda_src" in source for source in calls), "seconds": seconds}))
"""


def run(script: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a process with a cache of its own."""
    environment = {**os.environ, "CUPY_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = str(Path(jit.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result


def launch(cache: Path) -> dict[str, Any]:
    """Store keys in a fresh process, compare, and say how often NVRTC was called."""
    return dict(json.loads(run(LAUNCH, cache).stdout.splitlines()[-1]))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
        if path.suffix == ".cubin"
    }


BF16 = STORAGE[2]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "instance",
    [
        tiles.sgmv_shrink(BF16, 3, 8, True),
        tiles.sgmv_shrink(STORAGE[0], 1, 8, False),
        tiles.sgmv_shrink(BF16, 8, 128, True),
        tiles.sgmv_expand(BF16, BF16, 16, 8, True),
        tiles.sgmv_expand(BF16, BF16, 64, 64, True, 227 * 1024),
        tiles.sgmv_expand(BF16, BF16, 64, 128, True, 227 * 1024),
    ],
    ids=lambda instance: instance.name.removeprefix("lorakit::"),
)
def test_resident_blocks_are_what_the_resources_allow(instance: tiles.Instance, gpu: Any) -> None:
    """Registers come by 256 a warp, shared memory with what the driver keeps of it for each block."""
    backend = jit.cupy_backend(gpu.cuda.Device().id)
    kernel = backend._function(instance)
    has = gpu.cuda.Device().attributes
    warps = instance.threads // 32
    shared_bytes = instance.shared_bytes + kernel.shared_size_bytes + 1024
    each = min(
        has["MaxBlocksPerMultiprocessor"],
        has["MaxThreadsPerMultiProcessor"] // instance.threads,
        has["MaxRegistersPerMultiprocessor"] // (warps * -(-kernel.num_regs // 8) * 256),
        has["MaxSharedMemoryPerMultiprocessor"] // (-(-shared_bytes // 128) * 128),
    )
    assert backend.resident_blocks(instance) == each * has["MultiProcessorCount"]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_second_process_compiles_nothing(tmp_path: Path) -> None:
    first = launch(tmp_path)
    before = contents(tmp_path)
    second = launch(tmp_path)
    assert first["compiled"] == 1
    assert second["compiled"] == 0
    assert second["seconds"] < first["seconds"]
    assert before
    assert contents(tmp_path) == before


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_processes_at_the_same_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(launch, [tmp_path] * 4))
    assert all(result["compiled"] <= 1 for result in results)
    assert launch(tmp_path)["compiled"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("damage", ["empty", "short", "changed"])
@pytest.mark.usefixtures("gpu")
def test_damaged_cache_files(tmp_path: Path, damage: str) -> None:
    """Files cut off or changed on disk are compiled again, and replaced."""
    launch(tmp_path)
    for name, (_, data) in contents(tmp_path).items():
        changed = data[:-100] + bytes(byte ^ 0xFF for byte in data[-100:])
        cut = {"empty": b"", "short": data[: len(data) // 2], "changed": changed}
        (tmp_path / name).write_bytes(cut[damage])
    assert launch(tmp_path)["compiled"] == 1
    assert launch(tmp_path)["compiled"] == 0


HAS_FEATURES = """
extern "C" __global__ void has_features(int* result) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  *result = 1;
#else
  *result = 0;
#endif
}
"""


@pytest.mark.gpu
def test_hopper_gets_its_own_instructions(gpu: Any) -> None:
    """What CuPy adds to the options does not undo ``sm_90a``."""
    if gpu.cuda.Device().compute_capability != "90":
        pytest.skip("needs a GPU of compute capability 9.0")
    result = gpu.full(1, 7, np.int32)
    kernel = gpu.RawKernel(HAS_FEATURES, "has_features", options=jit.options(90))
    kernel((1,), (1,), (result,))
    assert result.get().tolist() == [1]


@needs_cupy
@pytest.mark.parametrize("flags", [("-arch=sm_90",), (*jit.options(90), "-arch=sm_90")])
def test_sm_90a_wins_over_the_architecture_that_cupy_appends(flags: tuple[str, ...]) -> None:
    """Documented nowhere: of two architectures NVRTC takes the one with more features."""
    jit.import_cupy()
    from cupy.cuda import nvrtc

    handle = nvrtc.createProgram(HAS_FEATURES, "features.cu", (), ())
    try:
        nvrtc.compileProgram(handle, flags)
        ptx = nvrtc.getPTX(handle).decode()
    finally:
        nvrtc.destroyProgram(handle)
    assert (".target sm_90a" in ptx) == (len(flags) > 1)


def test_a_cache_folder_that_cannot_be_written_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as tests may run as root
    with pytest.warns(UserWarning, match="cached for this process only"):
        jit.import_cupy.__wrapped__()
    assert os.environ["CUPY_CACHE_DIR"] != str(tmp_path)


def test_without_cupy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        ModuleNotFoundError, match="install lorakit with the extra cuda12 or cuda13"
    ):
        jit.import_cupy.__wrapped__()
