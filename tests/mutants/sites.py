"""The six classes of mutants, and where each class has sites in the CUDA sources."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.tokens import Source

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "cuda_src"
# The emulator has its own twins of these: a mutant of them would never run.
TWINS = ("common/ptx.cuh", "common/shared.cuh")

_FLIPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
# Names that come in pairs, and where.
_PAIRS = {
    "common/mma.cuh": ("a_top a_bottom", "b_left b_right", "low high", "upper odd"),
    "rope.cu": ("first second",),
    "rope_store.cu": ("first second", "k_row v_row", "key_row value_row", "start length"),
    "common/rope.cuh": (
        "re im",
        "cos sin",
        "real imaginary",
        "first second",
        "first_angles second_angles",
    ),
}
_ASSIGNMENTS = ("=", "+=", "-=", "*=", "return", ",", ":", "?")


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        kind: The class: a key of `KINDS`.
        path: Of the file, under cuda_src.
        line, column: Where, from 1.
        before, after: The text that is replaced, and by what.
        start: Where in the file `before` is.
        code: The whole line.
        nth: How often this very change of this very line came before in the file.
    """

    kind: str
    path: str
    line: int
    column: int
    before: str
    after: str
    start: int
    code: str
    nth: int = 0

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}:{self.column}"

    @property
    def key(self) -> str:
        """A name that outlives changes of other lines."""
        return json.dumps([self.kind, self.path, self.code, self.before, self.after, self.nth])

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.name} {self.kind}: {before!r} -> {after!r}"

    def apply(self, text: str) -> str:
        assert text.startswith(self.before, self.start)
        return text[: self.start] + self.after + text[self.start + len(self.before) :]


Edit = tuple[int, int, str]  # first token, last token, the text in their place


def _barriers(source: Source, path: str) -> Iterator[Edit]:
    """Removed barrier."""
    for i in range(len(source)):
        if source[i] in ("__syncthreads", "__syncwarp", "named_barrier"):
            yield i, source.match[i + 1], ""


def _bounds(source: Source, path: str) -> Iterator[Edit]:
    """Off by one: comparisons, ``+ 1`` and ``- 1``, the first value and the step of loops."""
    for i in range(len(source)):
        if source.constant[i]:
            continue
        if source[i] in _FLIPPED and source.tokens[i].spaced:
            yield i, i, _FLIPPED[source[i]]
        if source[i] in ("+", "-") and source.tokens[i].spaced and source[i + 1] == "1":
            yield i, i + 1, ""
            yield i, i + 1, f"{source[i]} 2"
        if source[i] == "for":
            yield from _loop(source, i)


def _loop(source: Source, i: int) -> Iterator[Edit]:
    first = next(j for j in range(i, len(source)) if source[j] == "=")
    end = source.right_end(first + 1, (",",))
    yield first + 1, end, f"{source.slice(first + 1, end)} + 1"
    close = source.match[i + 1]
    step = max(j for j in range(i, close) if source[j] == ";") + 1
    if source[step] in ("++", "--"):
        yield step, close - 1, f"{source[step + 1]} {source[step][0]}= 2"
    else:
        yield step, close - 1, f"{source.slice(step, close - 1)} + 1"


def _waits(source: Source, path: str) -> Iterator[Edit]:
    """Removed or wrong wait for asynchronous copies."""
    for i in range(len(source)):
        if source[i] == "cp_async_commit":
            yield i, i + 2, ""
        if source[i] == "cp_async_wait":
            close = next(j for j in range(i, len(source)) if source[j] == ">")
            yield i, close + 2, ""
            yield i + 2, close - 1, f"{source.slice(i + 2, close - 1)} + 1"


def _fragments(source: Source, path: str) -> Iterator[Edit]:
    """Swapped index of a fragment, a lane, a row or a column."""
    pairs = dict(
        pair for names in _PAIRS.get(path, ()) for pair in (names.split(), names.split()[::-1])
    )
    for i in range(len(source)):
        if source.constant[i]:
            continue
        text = source[i]
        if text in ("/", "%") and source.tokens[i].spaced and not _is_constant_product(source, i):
            yield i, i, "%" if text == "/" else "/"
        if text == "[" and source[i + 1].isdigit() and not _is_declared(source, i):
            yield i + 1, i + 1, str(int(source[i + 1]) ^ 1)
        if text == "at" and source[i - 1] in (".", "->") and source[i + 1] == "(":
            comma = source.right_end(i + 2, (",",)) + 1
            end = source.match[i + 1] - 1
            yield i + 2, end, f"{source.slice(comma + 1, end)}, {source.slice(i + 2, comma - 1)}"
        if (
            text in pairs and re.search(r"[\w>*&]$", source[i - 1]) is None
        ):  # not where it is declared
            yield i, i, pairs[text]
        if text == "__shfl_xor_sync":
            end = source.match[i + 1] - 1
            yield end, end, {"1": "2", "2": "1", "4": "8", "8": "16", "16": "8"}[source[end]]
        if text in ("ldmatrix_x4", "ldmatrix_x4_trans"):
            yield i, i, "ldmatrix_x4" if text.endswith("trans") else "ldmatrix_x4_trans"


def _is_constant_product(source: Source, i: int) -> bool:
    """Whether ``a / b`` has constants only, or is a quotient of floats."""
    first = source.operand(i - 1, -1)
    while source[first - 1] in ("*", "/", "%") and source.tokens[first - 1].spaced:
        first = source.operand(first - 2, -1)
    last = source.operand(i + 1, 1)
    return source.is_constant(first, last) or re.fullmatch(r"\d+\.\d*f", source[first]) is not None


def _is_declared(source: Source, i: int) -> bool:
    """Whether ``[n]`` is the size in a declaration, or no literal alone."""
    if source[i + 2] != "]":
        return True
    if source[i - 1] in (")", "]"):
        return source[i - 1] == ")" or _is_declared(source, source.match[i - 1])
    before = source[i - 2]
    if re.search(r"[\w>*&]$", before) is not None and before != "return":
        return True
    if before != ",":
        return False
    first = source.left_end(i - 2, ())
    return source[first] in ("float", "int", "T", "alignas", "unsigned") and "=" not in [
        source[j] for j in range(first, i)
    ]


def _masks(source: Source, path: str) -> Iterator[Edit]:
    """Removed mask: a condition forced, half of one left out, a clamp removed."""
    for i in range(len(source)):
        if source.constant[i]:
            continue
        if source[i] == "if" and source[i + 1] == "(":
            yield i + 2, source.match[i + 1] - 1, "true"
            yield i + 2, source.match[i + 1] - 1, "false"
        if source[i] == "?":
            first = source.left_end(i - 1, _ASSIGNMENTS)
            if not source.is_constant(first, i - 1):
                yield first, i - 1, "true"
                yield first, i - 1, "false"
        if source[i] in ("&&", "||"):
            stops = ("&&", "||", *_ASSIGNMENTS)
            first, last = source.left_end(i - 1, stops), source.right_end(i + 1, stops)
            if source[first - 1] not in ("&&", "||"):
                yield first, last, source.slice(i + 1, last)
            yield first, last, source.slice(first, i - 1)
        if source[i] in ("min", "max") and source[i + 1] == "(":
            comma, end = source.right_end(i + 2, (",",)) + 1, source.match[i + 1]
            yield i, end, source.slice(i + 2, comma - 1)
            yield i, end, source.slice(comma + 1, end - 1)


def _addresses(source: Source, path: str) -> Iterator[Edit]:
    """Address arithmetic cut to 32 bits; a kernel's parameters are cut where they are used."""
    parameters: dict[str, int] = {}  # name -> end of the kernel that has it
    for i in range(len(source)):
        if source[i] == "__global__":
            begin = next(j for j in range(i, len(source)) if source[j + 1] == "{") + 1
            signature = range(i, begin)
            parameters = {
                source[j + 2]: begin for j in signature if source[j] == source[j + 1] == "long"
            }
        if (
            source[i] in parameters
            and i > parameters[source[i]]
            and source[i - 1] not in (".", "->")
        ):
            yield i, i, f"static_cast<int>({source[i]})"
        if source[i] == source[i + 1] == "long":
            name = source[i + 2]
            is_cast = source[i - 2] + source[i - 1] == "static_cast<"
            is_declaration = not source.constant[i] and re.match(r"\w", name) is not None
            if is_cast or (is_declaration and i > parameters.get(name, 0)):
                yield i, i + 1, "int"


KINDS: dict[str, Callable[[Source, str], Iterator[Edit]]] = {
    "barrier": _barriers,
    "bound": _bounds,
    "wait": _waits,
    "fragment": _fragments,
    "mask": _masks,
    "address": _addresses,
}


def mutants_of(path: str, text: str) -> list[Mutant]:
    """All mutants of a file, by class and then by place."""
    source = Source(text)
    found: list[Mutant] = []
    seen: Counter[tuple[str, ...]] = Counter()
    for kind, edits in KINDS.items():
        for first, last, after in edits(source, path):
            start = source.tokens[first].start
            before = source.slice(first, last)
            line_start = text.rfind("\n", 0, start) + 1
            code = text[line_start : text.find("\n", start)].strip()
            line, column = text.count("\n", 0, start) + 1, start - line_start + 1
            if any(
                one.start == start and (one.before, one.after) == (before, after) for one in found
            ):
                continue
            same = (kind, code, before, after)
            nth = seen[same]
            seen[same] += 1
            found.append(Mutant(kind, path, line, column, before, after, start, code, nth))
    return found


def all_mutants(folder: Path = SOURCES) -> list[Mutant]:
    """The mutants of every source that the emulator runs."""
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.cu*"))
    return [
        mutant
        for path in paths
        if path not in TWINS
        for mutant in mutants_of(path, (folder / path).read_text())
    ]
