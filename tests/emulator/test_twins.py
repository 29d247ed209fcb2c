"""Each function of the headers that touch hardware has a twin of its signature, and the reverse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.emulator import build
from tests.emulator.backend import REPOSITORY

# Used by the real functions only: the emulator's pointers stay pointers.
WITHOUT_TWIN = {"unsigned shared_address(const void* pointer)"}
SITE = re.compile(r"(, )?emulator::Site site = emulator::Site::here\(\)")


def signatures(path: Path) -> set[str]:
    """The functions that a header defines in ``namespace lorakit``, members of classes included."""
    text = re.sub(r"//.*|^#.*", "", path.read_text(), flags=re.MULTILINE)
    text = re.sub(r"^\s*(public|private):", "", text, flags=re.MULTILINE)
    text = text.partition("namespace lorakit {")[2]
    found, declaration, depth = set(), "", 0
    for character in text:
        declaration += character
        if character == "}":
            depth = max(depth - 1, 0)  # classes do not count
        if character == "{":
            head = " ".join(declaration[:-1].split())
            if depth == 0 and not head.startswith(("class ", "struct ", "namespace ")):
                found.add(re.sub(r"\b(__device__|inline) ", "", SITE.sub("", head)))
            depth += 0 if depth == 0 and head.startswith(("class ", "struct ")) else 1
        if character in "{};":
            declaration = ""
    return found


@pytest.mark.parametrize("header", ["common/ptx.cuh", "common/shared.cuh"])
def test_signatures_of_twins(header: str) -> None:
    real = signatures(REPOSITORY / "cuda_src" / header)
    twins = signatures(build.INCLUDE / header)
    assert len(real) > 1
    assert real - WITHOUT_TWIN == twins


def test_every_twin_header_has_an_original() -> None:
    for twin in (build.INCLUDE / "common").iterdir():
        assert (REPOSITORY / "cuda_src" / "common" / twin.name).is_file()


def test_no_assembly_elsewhere() -> None:
    """Kernels run on the CPU only as long as all assembly is in the header that has twins."""
    for path in (REPOSITORY / "cuda_src").rglob("*.cu*"):
        if path.name != "ptx.cuh":
            assert not re.search(r"\basm\b|__CUDA_ARCH__|cooperative_groups", path.read_text()), (
                path
            )
