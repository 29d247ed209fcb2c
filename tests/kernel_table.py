"""What the compiler says about each kernel: ptxas' report, and one table of all instances."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

# C7508: setmaxnreg is ignored. C7514 and its neighbours: wgmma is serialized. Exceptions go here, each
# under (instance name, architecture) with the reason; there is none.
ALLOWED_WARNINGS: dict[tuple[str, str], str] = {}

_PER_KERNEL = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill"
)
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_WARNING = re.compile(r"warning|C75\d\d|setmaxnreg|serializ", re.IGNORECASE)


@dataclass(frozen=True)
class Report:
    """What ptxas needed for a kernel."""

    registers: int
    shared_bytes: int
    """Static shared memory."""
    local_bytes: int
    """Stack frame and spills, in bytes of a thread."""
    warnings: tuple[str, ...]


def read_report(log: str) -> Report:
    """The report of the only kernel in a log of ``ptxas -v``.

    Functions that were not inlined are listed too; the largest of each number counts.

    Raises:
        ValueError: The log has no report.
    """
    local = [sum(map(int, match.groups())) for match in _PER_KERNEL.finditer(log)]
    registers = [int(number) for number in _REGISTERS.findall(log)]
    if not local or not registers:
        raise ValueError(f"no report of ptxas in the log:\n{log}")
    return Report(
        registers=max(registers),
        shared_bytes=max((int(number) for number in _SHARED.findall(log)), default=0),
        local_bytes=max(local),
        warnings=tuple(line.strip() for line in log.splitlines() if _WARNING.search(line)),
    )


def table(rows: Iterable[tuple[str, str, tuple[int, int, int]]]) -> str:
    """A line of text for each instance.

    Args:
        rows: (instance, architecture, (registers, static shared bytes, dynamic shared bytes)).
    """
    numbers: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
    for name, arch, values in rows:
        numbers[name][arch] = values
    architectures = sorted({arch for of in numbers.values() for arch in of}, key=_order)
    lines = [
        "Registers of a thread + bytes of static shared memory of a block, for each architecture.",
        f"{'dynamic shared':>14}" + "".join(f"{arch:>12}" for arch in architectures),
    ]
    for name, of in sorted(numbers.items()):
        dynamic = next(iter(of.values()))[2]
        cells = [f"{of[arch][0]} + {of[arch][1]}" if arch in of else "-" for arch in architectures]
        lines.append(f"{dynamic:>14}" + "".join(f"{cell:>12}" for cell in cells) + f"  {name}")
    return "\n".join(lines)


def _order(arch: str) -> int:
    return int("".join(filter(str.isdigit, arch)))
