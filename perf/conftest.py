"""Benchmarks time by themselves under ``python -m pytest perf``, by the device's clock."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit.nn import DeviceRef
from perf import report
from perf.harness import Place, clock


@functools.cache
def place_of_this_run() -> Place:
    """The GPU when there is one, else the CPU."""
    return Place(DeviceRef.current())


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lorakit")
    group.addoption(
        "--save-results",
        metavar="NAME",
        help="write the table to perf/results/NAME.md",
    )
    group.addoption(
        "--commit", metavar="HASH", help="commit to name in saved results; default: git's"
    )


def pytest_configure(config: pytest.Config) -> None:
    # setup.cfg disables benchmarks, for tests; and the table below replaces pytest-benchmark's.
    config.option.benchmark_enable = True
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "benchmark" in item.fixturenames:
            group = item.originalname.removeprefix("test_")
            item.add_marker(pytest.mark.benchmark(timer=clock, group=group))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session: Any = config._benchmarksession  # type: ignore[attr-defined]
    done = [result for result in session.benchmarks if not result.has_error]
    if not done:
        return
    place = place_of_this_run()
    lines = [*report.header(place), "", *report.aligned(report.table(done, place.is_gpu))]
    terminalreporter.section("lorakit")
    for line in lines:
        terminalreporter.write_line(line)
    if name := config.getoption("save_results"):
        path = report.save(
            name, config.getoption("commit"), config.invocation_params.args, place, lines
        )
        terminalreporter.write_line(f"\nsaved as {path}")


@pytest.fixture(scope="session")
def place() -> Place:
    """Where the benchmarks run."""
    return place_of_this_run()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the case's name only."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def _no_errors_on_the_device() -> Iterator[None]:
    """A case that made kernels see bad values fails: it did not time what it says."""
    yield
    lorakit.check_errors()
