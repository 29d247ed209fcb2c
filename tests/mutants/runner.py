"""Runs the kernel tests over a mutant, until one fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.emulator import build, sanitizers
from tests.mutants.sites import REPOSITORY, SOURCES, Mutant

# The tests of each source, and of what launches its kernels; a header that is not here is everyone's.
TESTS = {
    **dict.fromkeys(
        ("sgmv_route.cu", "sgmv_shrink.cu", "sgmv_expand.cu", "common/sgmv.cuh"),
        ("tests/ops/test_sgmv.py", "tests/ops/test_sgmv_qkv.py"),
    ),
    "kv_cache.cu": ("tests/ops/test_kv_cache.py", "tests/ops/test_sgmv_qkv.py"),
    **dict.fromkeys(
        ("rope.cu", "rope_store.cu", "common/rope.cuh"),
        ("tests/ops/test_rope.py",),
    ),
    **dict.fromkeys(
        (
            "attention.cu",
            "attention_decode.cu",
            "attention_merge.cu",
            "common/attention.cuh",
            "common/attention_line.cuh",
            "common/attention_state.cuh",
        ),
        ("tests/ops/test_attention.py", "tests/ops/test_attention_options.py"),
    ),
    "common/mma.cuh": ("tests/ops/test_sgmv.py", "tests/ops/test_attention.py"),
    "common/tile.cuh": ("tests/ops/test_attention.py",),
    "common/reduce.cuh": ("tests/ops/test_sgmv.py", "tests/ops/test_attention.py"),
    "common/softmax.cuh": (
        "tests/ops/test_attention.py",
        "tests/ops/test_attention_options.py",
    ),
    "common/paged_kv.cuh": (
        "tests/ops/test_kv_layouts.py",
        "tests/ops/test_kv_cache.py",
        "tests/ops/test_rope.py",
        "tests/ops/test_attention.py",
    ),
}
# Of the tests of large addresses, those that run a source.
_LARGE = {
    "sgmv_route.cu": "shrink or expand or rank_vector",
    "sgmv_shrink.cu": "shrink or rank_vector",
    "sgmv_expand.cu": "expand or rank_vector",
    "common/sgmv.cuh": "shrink or expand or rank_vector",
    "kv_cache.cu": "store or add",
    "rope.cu": "rope",
    "rope_store.cu": "rope_store",
    "common/rope.cuh": "rope",
    "attention.cu": "attention or prefill",
    "attention_decode.cu": "attention",
    "common/attention.cuh": "attention or prefill",
    "common/paged_kv.cuh": "cache",
    "common/tile.cuh": "attention or prefill",
    "common/ragged.cuh": "threads or rows_of_attention or rank_vector",
}
_KERNELS = ("sgmv", "kv_cache", "rope", "attention", "sgmv_qkv")
ALL_TESTS = tuple(f"tests/ops/test_{name}.py" for name in _KERNELS)
COMMON_TESTS = (
    "tests/ops/test_bad_values.py",
    "tests/ops/test_edges.py",
    "tests/ops/test_large_addresses.py",
)

SECONDS = 900  # of a stage; clean sources need a tenth of it
_LAUNCH_SECONDS = 20
_FLAGS = ("-Og", "-g0")  # what compiles fastest

# pytest without the plugins that these tests do not need.
_QUICK = [
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-p",
    "no:benchmark",
    "-p",
    "no:hypothesispytest",
]
_QUICK += ["-o", "addopts=--import-mode=importlib --strict-markers"]


@dataclass(frozen=True)
class Stage:
    """One run of the tests.

    Attributes:
        name: What the results call it.
        schedule: The order in which threads run.
        sanitizer: "", "address" or "thread".
        tests: Files, or none for those of the mutant's source.
        marks: pytest's ``-m``.
    """

    name: str
    schedule: str = "in_order"
    sanitizer: str = ""
    tests: tuple[str, ...] = ()
    marks: str = ""


QUICK = Stage("quick")
_IN_ORDER = Stage("in order")
_ORDERS = (Stage("lifo", "lifo"), Stage("random", "random"))
_REPEATED = Stage("repeated", tests=("tests/ops/test_invariance.py",))
_ASAN = (
    Stage("ASan", sanitizer="address", tests=COMMON_TESTS[:2]),
    Stage("ASan", sanitizer="address", marks="sanitize"),
)
_TSAN = Stage("TSan", sanitizer="thread", marks="sanitize")
_LARGE_ADDRESSES = Stage("large addresses", tests=COMMON_TESTS[2:])
STAGES = {
    "barrier": (*reversed(_ORDERS), _IN_ORDER, _TSAN, _REPEATED),
    "wait": (_IN_ORDER, *_ORDERS, _TSAN, _REPEATED),
    "bound": (_IN_ORDER, *_ORDERS, *_ASAN, _TSAN, _REPEATED),
    "mask": (_IN_ORDER, *_ORDERS, *_ASAN, _TSAN, _REPEATED),
    "fragment": (_IN_ORDER, *_ORDERS, _REPEATED),
    "address": (_LARGE_ADDRESSES, _IN_ORDER, *_ASAN),
}


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed by something, or nothing (it survived)."""

    killed_by: str
    seconds: float


def tests_of(path: str) -> tuple[str, ...]:
    return (*TESTS.get(path, ALL_TESTS), *COMMON_TESTS)


class Workshop:
    """A copy of the sources, and a folder for what is compiled from it. One mutant at a time."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lorakit-mutant-"))
        self.sources, self.cache = self.folder / "cuda_src", self.folder / "cache"
        shutil.copytree(SOURCES, self.sources)
        self.cache.mkdir()
        runtime = build.runtime_library()  # made once for all
        shutil.copy(runtime, self.cache / runtime.name)
        self._runtime = runtime.name
        self._headers = self.folder / "precompiled"
        self._precompile(self._headers / "emulator" / "launcher.h.gch")

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def _precompile(self, path: Path) -> None:
        """What every kernel includes first: read once for all mutants but those of types.cuh."""
        path.parent.mkdir(parents=True)
        folders = (build.INCLUDE, self.sources, build.cuda_include())
        header = build.INCLUDE / "emulator" / "launcher.h"
        command = [build.compiler(), *build.KERNEL_FLAGS, *_FLAGS, *(f"-I{f}" for f in folders)]
        command += ["-w", "-x", "c++-header", str(header), "-o", str(path)]
        subprocess.run(command, check=True)

    def judge(self, mutant: Mutant, stages: Sequence[Stage]) -> Verdict:
        """Run stages until one kills the mutant."""
        begin = time.monotonic()
        text = (self.sources / mutant.path).read_text()
        (self.sources / mutant.path).write_text(mutant.apply(text))
        try:
            for stage in stages:
                select = _LARGE.get(mutant.path, "") if stage is _LARGE_ADDRESSES else ""
                quick = mutant.path != "common/types.cuh"
                killer = self.run(stage, stage.tests or tests_of(mutant.path), select, quick)
                if killer:
                    return Verdict(f"{stage.name}: {killer}", time.monotonic() - begin)
            return Verdict("", time.monotonic() - begin)
        finally:
            (self.sources / mutant.path).write_text(text)
            for path in self.cache.iterdir():
                if path.name != self._runtime:
                    path.unlink() if path.is_file() else shutil.rmtree(path)

    def run(
        self, stage: Stage, tests: Sequence[str], select: str = "", precompiled: bool = True
    ) -> str:
        """What fails: the first test, "compiler" or "timeout"; an empty string when all pass."""
        environment = sanitizers.environment(stage.sanitizer) if stage.sanitizer else {**os.environ}
        environment.pop("PYTEST_ADDOPTS", None)  # of the run that this may be a part of
        environment |= {
            "LORAKIT_EMULATOR_SOURCES": str(self.sources),
            "LORAKIT_EMULATOR_CACHE": str(self.cache),
            "LORAKIT_EMULATOR_SCHEDULE": stage.schedule,
            "LORAKIT_EMULATOR_SEED": "1",
            "LORAKIT_MUTANTS_QUICK": "1" if stage == QUICK else "",
            "LORAKIT_EMULATOR_SECONDS": str(_LAUNCH_SECONDS),
            "LORAKIT_EMULATOR_OPTIMIZATION": " ".join(_FLAGS)
            + (f" -I{self._headers}" if precompiled and not stage.sanitizer else ""),
        }
        options = ["-x", "-q", "-rfE", "--tb=short", "--kernels=emulator"]
        options += ["-p", "tests.mutants.shuffle", *_QUICK]
        options += ["-m", stage.marks] if stage.marks else []
        options += ["-k", select] if select else []
        try:
            result = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *tests],
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return "timeout"
        if result.returncode == 0:
            return ""
        if result.returncode < 0:
            return f"signal {-result.returncode}"
        if result.returncode != 1:
            raise RuntimeError(f"pytest could not run:\n{result.stdout}\n{result.stderr}")
        if f"{build.compiler()} -std=" in result.stdout and ": error: " in result.stdout:
            return "compiler"
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
        return failed[1] if failed else "pytest"
