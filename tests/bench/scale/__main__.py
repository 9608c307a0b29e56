"""`make bench-scale`: idle workers, full tables, memory, and how cost grows."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from tests.bench.processes import BenchError
from tests.bench.scale import full, idle, memory, processes, workers
from tests.bench.scale.curves import curves
from tests.bench.scale.findings import Finding, Findings
from tests.bench.scale.full import Sizes
from tests.bench.scale.stage import Stage
from tests.bench.screen import Screen
from tests.bench.servers import measured_servers

_STYLES: Final = {True: "green", False: "red", None: "bold"}
_LINES: Final = Path(".bench/scale.jsonl")
_PICTURE: Final = Path("docs/images/scale.svg")
_TARGET: Final = Sizes((10_000, 100_000, 1_000_000), (50_000, 500_000, 5_000_000), 20_000, 100_000, 5)


@dataclass(frozen=True)
class Size:
    """How much of everything; the whole sizes are the targets', a quick run takes a tenth of each."""

    sizes: Sizes = _TARGET
    idle_seconds: float = 60
    noop_growth: tuple[int, int] = (100_000, 1_000_000)
    orm_growth: tuple[int, int] = (10_000, 60_000)
    orm: int = 5_000
    rounds: int = 3
    processes: tuple[int, ...] = processes.PROCESSES
    workers: tuple[int, ...] = workers.WORKERS


def _sized(share: float) -> Size:
    def some(count: int) -> int:
        return max(round(count * share), 100)

    def points(counts: tuple[int, ...]) -> tuple[int, ...]:
        return counts if share == 1 else (some(counts[-1]),)  # a curve is for those who have time

    def span(jobs: tuple[int, int]) -> tuple[int, int]:
        return some(jobs[0]), some(jobs[1])

    sizes = Sizes(
        points(_TARGET.waiting), points(_TARGET.finished), some(_TARGET.jobs),
        some(_TARGET.under_snapshot), _TARGET.rounds if share == 1 else 3,
    )  # fmt: skip
    whole = Size()
    seconds = whole.idle_seconds if share == 1 else 20
    rounds = whole.rounds if share == 1 else 1
    counts = (whole.processes, whole.workers) if share == 1 else (whole.processes[:2], whole.workers[:2])
    return Size(sizes, seconds, span(whole.noop_growth), span(whole.orm_growth), some(whole.orm), rounds, *counts)


Part = Callable[[Stage, Findings], Awaitable[None]]


def parts(size: Size) -> dict[str, Part]:
    """What is measured, by name, in this order."""
    return {
        "idle": partial(idle.idle, seconds=size.idle_seconds),
        "waiting": partial(full.waiting, sizes=size.sizes),
        "finished": partial(full.finished, sizes=size.sizes),
        "snapshot": partial(full.snapshot, sizes=size.sizes),
        "memory": partial(memory.beside_arq, jobs=size.orm, rounds=size.rounds),
        "growth": partial(memory.growth, spans={"noop": size.noop_growth, "orm": size.orm_growth}),
        "processes": partial(processes.processes, counts=size.processes, jobs=size.sizes.jobs, rounds=size.rounds),
        "workers": partial(workers.workers, counts=size.workers, jobs=size.sizes.jobs, seconds=size.idle_seconds),
    }


def main() -> int:
    """Parse the arguments and run; 0 whatever the figures are, for speed is no test."""
    known = list(parts(Size()))
    parser = argparse.ArgumentParser(prog="make bench-scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of each size, in some 5 minutes")
    parser.add_argument("--share", type=float, default=1.0, help="this share of each size")
    parser.add_argument("--parts", help=f"some of {', '.join(known)}")
    asked = parser.parse_args()
    wanted = [name.strip() for name in asked.parts.split(",")] if asked.parts else known
    if unknown := next((name for name in wanted if name not in known), None):
        parser.error(f"no {unknown!r}; there are {', '.join(known)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves nothing behind, as after Ctrl-C
    screen = Screen()
    findings = Findings(
        lambda one: screen.say(_said(one), _STYLES[one.met]),
        lambda line: screen.say(line, "dim"),
    )
    try:
        failed = asyncio.run(run(_sized(0.1 if asked.quick else asked.share), wanted, screen, findings))
    except KeyboardInterrupt:
        print("interrupted; everything that was started is gone", file=sys.stderr)
        return 130
    whole = not (asked.quick or asked.parts or asked.share != 1)
    write(findings.all, _LINES, _PICTURE if whole else _LINES.with_suffix(".svg"))
    Console().print(_table(findings.all))
    return 2 if failed else 0


async def run(size: Size, wanted: list[str], screen: Screen, findings: Findings) -> list[str]:
    """Measure these parts; returns the names of those that could not be."""
    failed = []
    async with measured_servers() as servers:
        screen.introduce(servers.facts, await servers.commit_ms())
        for name in wanted:
            screen.say(f"{name} …", "bold")
            with tempfile.TemporaryDirectory(prefix="exarq-bench-") as folder:
                async with AsyncExitStack() as stack:
                    try:
                        await parts(size)[name](Stage(servers, stack, Path(folder)), findings)
                    except (BenchError, TimeoutError) as error:
                        failed.append(name)
                        screen.say(f"{name}: {error or type(error).__name__}", "bold red")
    return failed


def write(found: list[Finding], lines: Path, picture: Path) -> None:
    """Keep what was found, one JSON object a line, and draw its curves."""
    for path in (lines, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    if drawn := curves(found):
        picture.write_text(drawn)
    lines.write_text("".join(json.dumps(one.line(), ensure_ascii=False) + "\n" for one in found))


def _said(one: Finding) -> str:
    target = "" if one.target is None else f", {one.sense} {one.target:g} asked for"
    note = f" ({one.note})" if one.note else ""
    return f"{one.case}: {one.measure} {_figure(one)}{target}{note}"


def _figure(one: Finding) -> str:
    value = f"{one.value:,.0f}" if abs(one.value) >= 100 else f"{one.value:.2f}"
    return f"{value} {one.unit}".strip()


def _table(found: list[Finding]) -> Table:
    table = Table("", "with", "measured", "found", "asked for", "", "")
    last = ""
    for one in found:
        if last and one.part != last:
            table.add_section()
        met = {True: "[green]met", False: "[red]not met", None: ""}[one.met]
        asked = "" if one.target is None else f"{one.sense} {one.target:g}"
        table.add_row(one.part if one.part != last else "", one.case, one.measure, _figure(one), asked, met, one.note)
        last = one.part
    return table


if __name__ == "__main__":
    sys.exit(main())
