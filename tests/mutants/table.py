"""The tables of RESULTS.md, made from the verdicts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from tests.mutants import equivalents
from tests.mutants.runner import Verdict
from tests.mutants.sites import KINDS, TWINS, Mutant

_TITLES = {
    "barrier": "removed barrier",
    "bound": "off-by-one index or bound",
    "wait": "removed or wrong wait count",
    "fragment": "swapped fragment index",
    "mask": "removed mask",
    "address": "addresses cut to 32 bits",
}


def fate(mutant: Mutant, verdicts: Mapping[Mutant, Verdict]) -> str:
    if equivalents.reason_of(mutant):
        return "equivalent"
    if mutant not in verdicts:
        return "not decided"
    return "killed" if verdicts[mutant].killed_by else "survived"


def markdown(mutants: Sequence[Mutant], verdicts: Mapping[Mutant, Verdict]) -> str:
    fates = {mutant: fate(mutant, verdicts) for mutant in mutants}
    total = Counter(fates.values())
    wrong = len(mutants) - total["equivalent"]
    parts = [
        "# Mutants of the CUDA sources",
        "Written by `python -m tests.mutants --json FILE --table tests/mutants/RESULTS.md`. Each mutant "
        "is one change of one place; the kernel tests run over it on the emulator: threads in order, last-in "
        "first-out, in a random order, and under sanitizers, until one fails.",
        f"**{len(mutants)} mutants: {total['killed']} killed, {total['survived']} survived, "
        f"{total['equivalent']} equivalent, {total['not decided']} not decided.** "
        f"At least {100 * total['killed'] / max(wrong, 1):.1f} % of what is not equivalent is killed: "
        "what is not decided counts as alive.",
        f"Not mutated: {' and '.join(TWINS)}, which the emulator replaces by twins: "
        "`tests/test_ptx.py` reads what NVRTC makes of them.",
        "## By class",
        _table(fates, "class", KINDS, lambda mutant: mutant.kind, _TITLES.__getitem__),
        "## By source",
        _table(fates, "source", sorted({m.path for m in mutants}), lambda mutant: mutant.path, str),
        "## What killed them",
        _killers(mutants, fates, verdicts),
        "## Survivors",
        "\n".join(f"- {_code(m)}" for m in mutants if fates[m] == "survived") or "None.",
        "## Not decided",
        "Not killed by the tests that were run so far, which are not all: most only by the few quick ones.",
        "\n".join(f"- {_code(m)}" for m in mutants if fates[m] == "not decided") or "None.",
        "## Equivalent mutants",
        "By reasoning, not by running: `--equivalents` runs them.",
        "\n".join(_reasons(mutants)),
    ]
    return "\n\n".join(parts) + "\n"


def _table(
    fates: Mapping[Mutant, str],
    title: str,
    rows: Iterable[str],
    group: Callable[[Mutant], str],
    name: Callable[[str], str],
) -> str:
    columns = ("killed", "survived", "equivalent", "not decided")
    counts = Counter((group(mutant), fate) for mutant, fate in fates.items())
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = (str(counts[row, column]) for column in columns)
        lines.append(f"| {name(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _killers(
    mutants: Sequence[Mutant], fates: Mapping[Mutant, str], verdicts: Mapping[Mutant, Verdict]
) -> str:
    killers: Counter[str] = Counter()
    for mutant in mutants:
        if fates[mutant] == "killed":
            stage, _, test = verdicts[mutant].killed_by.replace("quick", "in order").partition(": ")
            file = re.search(r"(\w+)\.py", test)
            killers[f"{stage}: {f'{file[1]}.py' if file else test}"] += 1
    return "\n".join(f"- {count} by {killer}" for killer, count in killers.most_common())


def _reasons(mutants: Sequence[Mutant]) -> list[str]:
    lines = []
    for entry in equivalents.EQUIVALENTS:
        covered = [mutant for mutant in mutants if entry.covers(mutant)]
        lines.append(f"- {entry.reason}")
        lines += [f"  - {_code(mutant)}" for mutant in covered]
    return lines


def _code(mutant: Mutant) -> str:
    before, after = (" ".join(text.split()) for text in (mutant.before, mutant.after))
    return f"{mutant.name} `{before}` -> `{after or '(nothing)'}`"
