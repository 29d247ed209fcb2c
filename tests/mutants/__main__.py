"""The command: ``python -m tests.mutants --help``."""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.mutants import equivalents, table
from tests.mutants.runner import QUICK, STAGES, Stage, Verdict, Workshop
from tests.mutants.sites import KINDS, Mutant, all_mutants


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--class", dest="kinds", action="append", choices=KINDS, help="only these")
    parser.add_argument("--source", action="append", help="only these files, such as rope.cu")
    parser.add_argument("--site", action="append", help="only these, such as rope.cu:108:5")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--tests", nargs="+", help="run these tests only, in order")
    parser.add_argument("--stage", action="append", help="run only these stages of a class")
    parser.add_argument(
        "--quick", action="store_true", help="run a few tests only, which kill most"
    )
    parser.add_argument("--until", help="start no mutant after this time of day, such as 15:20")
    parser.add_argument(
        "--equivalents", action="store_true", help="run those known as equivalent, and no others"
    )
    parser.add_argument(
        "--json", type=Path, help="add results here; what is in it is not run again"
    )
    parser.add_argument("--table", type=Path, help="write the table of --json here")
    options = parser.parse_args()

    everything = all_mutants()
    for entry in equivalents.stale(everything):
        print(f"no such mutant any more: {entry}")
    chosen = [
        mutant
        for mutant in everything
        if (not options.kinds or mutant.kind in options.kinds)
        and (not options.source or mutant.path in options.source)
        and (not options.site or mutant.name in options.site)
        and bool(equivalents.reason_of(mutant)) == options.equivalents
    ]
    if options.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return 0
    results = load(options.json)
    todo = [mutant for mutant in chosen if mutant.key not in results]
    chosen_stages: dict[str, tuple[Stage, ...]]
    if options.quick:
        chosen_stages = dict.fromkeys(KINDS, (QUICK,))
    elif options.tests:
        chosen_stages = dict.fromkeys(KINDS, (Stage("in order", tests=tuple(options.tests)),))
    else:
        chosen_stages = {
            kind: tuple(s for s in stages if not options.stage or s.name in options.stage)
            for kind, stages in STAGES.items()
        }
    run(todo, options.jobs, chosen_stages, options.until, options.json, results)
    verdicts = {mutant: results[mutant.key] for mutant in everything if mutant.key in results}
    if options.table:
        options.table.write_text(table.markdown(everything, verdicts))
    survivors = [m for m in chosen if m in verdicts and not verdicts[m].killed_by]
    print(f"{len(survivors)} of {len(chosen)} survived", *survivors, sep="\n")
    return int(bool(survivors))


def load(path: Path | None) -> dict[str, Verdict]:
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["mutant"]: Verdict(line["killed_by"], line["seconds"]) for line in lines}


def run(
    mutants: list[Mutant],
    jobs: int,
    stages: Mapping[str, Sequence[Stage]],
    until: str | None,
    path: Path | None,
    results: dict[str, Verdict],
) -> None:
    workshops: queue.Queue[Workshop] = queue.Queue()
    for _ in range(jobs):
        workshops.put(Workshop())

    def judge(mutant: Mutant) -> Verdict | None:
        if until and time.strftime("%H:%M") >= until:
            return None
        workshop = workshops.get()
        try:
            return workshop.judge(mutant, stages[mutant.kind])
        finally:
            workshops.put(workshop)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(judge, mutant): mutant for mutant in mutants}
        for number, future in enumerate(as_completed(futures), 1):
            mutant, verdict = futures[future], future.result()
            if verdict is None:
                continue
            results[mutant.key] = verdict
            fate = verdict.killed_by or "SURVIVED"
            print(f"{number}/{len(mutants)} {mutant} {fate} ({verdict.seconds:.0f} s)", flush=True)
            if path and (verdict.killed_by or stages == STAGES):
                with path.open("a") as file:
                    line = {"mutant": mutant.key, **vars(verdict)}
                    file.write(json.dumps(line) + "\n")
    while not workshops.empty():
        workshops.get().__exit__()


if __name__ == "__main__":
    sys.exit(main())
