"""The table of a run, and where it is kept."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorakit.demo.info import environment
from perf.harness import (
    BYTES_PER_SECOND,
    FLOPS_PER_SECOND,
    LEAST_SECONDS,
    ROUNDS,
    Place,
)

RESULTS = Path(__file__).parent / "results"


def header(place: Place) -> list[str]:
    """What the numbers of the table mean on this device."""
    lines = ["; ".join(f"{name} {value}" for name, value in environment(place.device).items())]
    if not place.is_gpu:
        return [
            *lines,
            "CPU: small sizes, the references against plain NumPy. They show that the sweep works and",
            "is right; they say nothing about the kernels. Floors are those of a GPU: left out.",
            f"time: median of {ROUNDS} calls by the host's clock, caches warm.",
        ]
    return [
        *lines,
        f"time: median of {ROUNDS} replays of a CUDA graph of one call, between events, L2 cold, for which",
        f"the clock shows {place.least_reading() * 1e6:.2f} us where it is a copy of one element;",
        "of sgmv: of a graph of many calls on other weights each time, over their number.",
        f"floor: the larger of bytes / {BYTES_PER_SECOND / 1e12:g} TB/s and operations / "
        f"{FLOPS_PER_SECOND / 1e12:g} TFLOP/s, what one H200",
        f"reached, but at least {LEAST_SECONDS * 1e6:g} us.",
    ]


def table(benchmarks: Iterable[Any], is_gpu: bool) -> list[list[str]]:
    """A row of cells for each benchmark, the names of the columns first."""
    benchmarks = list(benchmarks)
    more = list(dict.fromkeys(name for of in benchmarks for name in of.extra_info.get("more", {})))
    rows = [
        [
            "op",
            "case",
            "time us",
            "IQR us",
            "MB",
            "GB/s",
            "TFLOP/s",
            "floor us",
            "floor/time",
            "baseline",
            "us",
            "speedup",
            "budget",
            *more,
        ]
    ]
    for result in benchmarks:
        info, stats = result.extra_info, result.stats
        micros = stats.median * 1e6
        flops = f"{info['flops'] / stats.median / 1e12:.1f}" if info["flops"] and is_gpu else "-"
        rows.append(
            [
                result.group,
                result.param,
                f"{micros:.2f}",
                f"{stats.iqr * 1e6:.2f}",
                f"{info['bytes'] / 1e6:.3f}",
                f"{info['bytes'] / stats.median / 1e9:.1f}",
                flops,
                f"{info['floor_us']:.2f}" if is_gpu else "-",
                f"{info['floor_us'] / micros:.0%}" if is_gpu else "-",
                info["baseline"],
                f"{info['baseline_us']:.2f}",
                f"{info['baseline_us'] / micros:.2f}x",
                f"{info['share_of_budget']:.1%}",
                *(info.get("more", {}).get(name, "-") for name in more),
            ]
        )
    return rows


def aligned(rows: list[list[str]]) -> list[str]:
    """The table as text: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    names = {rows[0].index(name) for name in ("op", "case", "baseline")}
    return [
        "  ".join(
            cell.ljust(width) if i in names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def save(
    name: str, commit: str | None, arguments: Sequence[str], place: Place, lines: list[str]
) -> Path:
    """Write a table to ``perf/results/NAME.md``, with commit and date.

    Args:
        name: Of the file.
        commit: Named as it is; None: asked of git.
        arguments: Of pytest, in this run.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    text = [
        f"# {name}",
        "",
        f"- commit: {commit or current_commit()}",
        f"- date: {date}",
        *(f"- {key}: {value}" for key, value in environment(place.device).items()),
        f"- command: `python -m pytest {' '.join(arguments)}`",
        "",
        "```",
        *lines,
        "```",
        "",
    ]
    path.write_text("\n".join(text))
    return path


def current_commit() -> str:
    """The commit that is checked out, and whether files differ from it; ``unknown`` without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
