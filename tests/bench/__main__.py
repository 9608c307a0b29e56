"""`make bench`: Exarq and its peers side by side, on the same durable servers."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from tests.bench import install, workloads
from tests.bench.plot import plot
from tests.bench.processes import BenchError
from tests.bench.rows import row
from tests.bench.run import Results, run
from tests.bench.screen import Screen
from tests.bench.targets import Field, judge
from tests.bench.workloads import Plan

_FOLDER = Path(".bench")
_PLOT = Path("docs/images/bench.svg")


def main() -> int:
    """Parse the arguments and run; 0 whatever the figures are, for speed is no test."""
    plan = _plan()
    screen = Screen()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves nothing behind, as after Ctrl-C
    try:
        results = asyncio.run(run(plan, screen))
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; everything that was started is gone", file=sys.stderr)
        return 130
    rows = rows_of(results)
    write(rows, _FOLDER / "latest.jsonl", _PLOT if plan.whole else _FOLDER / "latest.svg")
    screen.conclude(results, rows, judge(field_of(results)))
    return 0


def write(rows: list[dict[str, Any]], lines: Path, picture: Path) -> None:
    """Keep the rows, one JSON object a line, and draw them."""
    for path in (lines, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("".join(json.dumps(line) + "\n" for line in rows))
    picture.write_text(plot(rows))


def field_of(results: Results) -> Field:
    """Who took part, as the targets ask for them."""
    peers = [system for system in results.systems if system.name not in (workloads.EXARQ, workloads.LIMIT)]
    in_postgres = tuple(peer.name for peer in peers if peer.about.keeps_in == "postgresql")
    return Field(results.of, tuple(peer.name for peer in peers), in_postgres)


def rows_of(results: Results) -> list[dict[str, Any]]:
    """The lines of `.bench/latest.jsonl`."""
    found = []
    order = {workload.key: place for place, workload in enumerate(workloads.WORKLOADS)}
    for measured in sorted(results.measured.values(), key=lambda measured: order[measured.workload.key]):
        runs, workload, system = list(measured.runs.values()), measured.workload, measured.system
        if not runs:
            continue
        found.append(row(system.name, system.version, workload.name, workload.processes, runs))
        if by_hand := [run.by_hand for run in runs if run.by_hand]:
            found.append(row("by hand", system.version, workload.name, workload.processes, by_hand))
    return found


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    known = install.known(workloads.SYSTEMS)
    names = sorted({workload.name for workload in workloads.WORKLOADS})
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(workloads.QUICK)}, in under 3 minutes")
    parser.add_argument("--systems", help=f"some of {', '.join(known)}")
    parser.add_argument("--workloads", help=f"some of {', '.join(names)}")
    parser.add_argument("--processes", type=int, help="only those with so many processes")
    parser.add_argument("--rounds", type=int, help="how often each system runs each workload")
    parser.add_argument("--seconds", type=float, help="how long a run lasts about")
    parser.add_argument("--jobs", type=int, help="jobs a run, instead of as many as last so long")
    asked = parser.parse_args()
    quick = asked.quick
    systems = tuple(_some(parser, asked.systems, known)) or (workloads.QUICK if quick else tuple(known))
    wanted = _some(parser, asked.workloads, names) or names
    rounds = asked.rounds or (2 if quick else 5)
    return Plan(
        systems=systems,
        workloads=tuple(
            found
            for found in workloads.WORKLOADS
            if found.name in wanted and asked.processes in (None, found.processes)
        ),
        rounds=rounds,
        pairs=asked.rounds or (5 if quick else 15),
        seconds=asked.seconds or (1 if quick else 3),
        jobs=asked.jobs,
        quick=quick,
        whole=not (quick or asked.systems or asked.workloads or asked.processes or asked.jobs),
    )


def _some(parser: argparse.ArgumentParser, said: str | None, known: list[str]) -> list[str]:
    chosen = [name.strip() for name in said.split(",")] if said else []
    if unknown := next((name for name in chosen if name not in known), None):
        parser.error(f"no {unknown!r}; there are {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
