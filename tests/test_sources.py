"""The CUDA sources without a GPU: NVRTC compiles every instance for every architecture, cleanly."""

from __future__ import annotations

import importlib.util
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit import jit, tiles
from tests import kernel_table

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted(jit.sources().rglob("*.cu*"))

# Ampere, Hopper, consumer Blackwell. LORAKIT_GATE_ARCHITECTURES=sm_86,sm_89,sm_100 checks others.
ARCHITECTURES = tuple(
    os.environ.get("LORAKIT_GATE_ARCHITECTURES", "sm_80,sm_90a,sm_120").split(",")
)


@pytest.fixture(scope="module")
def nvrtc() -> None:
    """Skips where CuPy or NVRTC is not installed: the gate is part of the extra ``test-cpu``."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs CuPy: pip install '.[test-cpu]'")
    jit.import_cupy()
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"needs NVRTC: {error}")


def short(instance: tiles.Instance) -> str:
    return instance.name.removeprefix("lorakit::").replace(" ", "")


# The slow ones first, so that none is left alone at the end of a run in parallel.
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "instance",
    sorted(tiles.instances(), key=operator.attrgetter("source")),
    ids=short,
)
@pytest.mark.usefixtures("nvrtc")
def test_instance(
    instance: tiles.Instance, arch: str, record_property: Callable[[str, object], None]
) -> None:
    """Compiles, without memory of a thread's own (spills, stack) and without warnings of ptxas."""
    cubin, log = jit.compile_cubin(instance.source, [instance.name], arch)
    report = kernel_table.read_report(log)

    assert cubin
    assert report.local_bytes == 0, log
    if (instance.name, arch) not in kernel_table.ALLOWED_WARNINGS:
        assert report.warnings == (), log
    assert report.registers <= 65536 // instance.threads, log
    numbers = (report.registers, report.shared_bytes, instance.shared_bytes)
    record_property("kernel", (instance.name, arch, numbers))


@pytest.mark.parametrize(
    "instance", [instance for instance in tiles.instances() if instance.early], ids=short
)
@pytest.mark.usefixtures("nvrtc")
def test_early_kernels_read_nothing_ahead(instance: tiles.Instance) -> None:
    """ptxas moves a load that says its memory never changes above the wait for who writes it."""
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda import nvrtc

    flags = assemble_cupy_compiler_options(("-std=c++17", f"-I{jit.sources()}"))
    program = nvrtc.createProgram(jit.program(instance.source), "program.cu", (), ())
    try:
        nvrtc.addNameExpression(program, instance.name)
        nvrtc.compileProgram(program, (*flags, "--gpu-architecture=compute_90"))
        ptx = nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    text = ptx if isinstance(ptx, str) else ptx.decode()
    assert "griddepcontrol.wait" in text
    assert "ld.global.nc" not in text


def test_report_sees_spills_and_warnings() -> None:
    """The reader of the report fails on what the gate is there for."""
    clean = (
        "ptxas info    : Function properties for f\n"
        "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 77 registers, used 1 barriers, 24 bytes smem\n"
    )
    assert kernel_table.read_report(clean) == kernel_table.Report(77, 24, 0, ())
    spilled = clean.replace("0 bytes spill stores", "8 bytes spill stores")
    assert kernel_table.read_report(spilled).local_bytes == 8
    stack = clean.replace("0 bytes stack", "40 bytes stack")
    assert kernel_table.read_report(stack).local_bytes == 40
    for warning in (
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored",
        "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async is serialized",
        "sgmv_route.cu(12): warning #177-D: variable was declared but never referenced",
    ):
        assert kernel_table.read_report(clean + warning).warnings == (warning,)
    with pytest.raises(ValueError, match="no report of ptxas"):
        kernel_table.read_report("")


# ---- Rules for the text of the sources ------------------------------------------------------------


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_sources_are_found() -> None:
    assert {"sgmv_shrink.cu", "rope.cu", "attention.cu", "ptx.cuh"} <= set(names(SOURCES))
    assert {instance.source for instance in tiles.instances()} <= set(names(SOURCES))


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_includes(path: Path) -> None:
    """Only CUDA's own headers and <common/...>, spelled from the root; a kernel includes no kernel."""
    for include in re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text(), re.MULTILINE):
        assert re.fullmatch(r"<(cuda_\w+\.h|cuda/std/\w+|common/\w+\.cuh)>", include), include


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_instructions_are_in_one_header(path: Path) -> None:
    has_asm = re.search(r"\basm\b", without_comments(path.read_text())) is not None
    assert has_asm <= (path.name == "ptx.cuh"), f"{path.name} has asm: put it into common/ptx.cuh"


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_first_line_says_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("// ")


def test_files_can_be_read_whole() -> None:
    """No source of the package is longer than 500 lines."""
    package = [*SOURCES, *sorted(Path(jit.__file__).parent.rglob("*.py"))]
    lengths = {path.name: len(path.read_text().splitlines()) for path in package}
    assert {name: length for name, length in lengths.items() if length > 500} == {}
