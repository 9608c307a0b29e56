"""What a chaos run shows: what it breaks as it breaks it, a table at the end, and one JSON object as the last line."""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos import looks
from tests.chaos.checker import Findings
from tests.chaos.faults import Fault
from tests.chaos.measure import Row, percentile
from tests.chaos.stage import Stage

_SHOWN = 5


class Screen:
    """The terminal, or a file."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
        self._begun = time.monotonic()

    def say(self, line: str, style: str = "") -> None:
        """One line, with the time since the start."""
        self._console.print(f"{time.monotonic() - self._begun:6.1f} s  {line}", style=style, markup=False)

    def broken(self, fault: Fault) -> None:
        """A fault begins."""
        self.say(f"{fault.name}: {fault.says}", "bold red")

    async def introduce(self, stage: Stage, seed: str, lease: float) -> None:
        """What is under test, and on what."""
        postgres, redis = await stage.postgres.facts(), await stage.redis_server.facts()
        durable = ", ".join(f"{name} {value}" for name, value in postgres.items() if name != "server_version")
        self.say(f"PostgreSQL {postgres['server_version']} ({durable}); {redis['server']} {redis['server_version']}")
        self.say(
            f"{len(stage.workers)} workers, {len(stage.producers)} producers, Python {platform.python_version()};"
            f" lease {lease:g} s, seed {seed}"
        )

    @asynccontextmanager
    async def following(self, stage: Stage) -> AsyncIterator[None]:
        """Show how far the work is while the block lasts; on a terminal only."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status("") as status:

            async def follow() -> None:
                last, before = 0, time.monotonic()
                while True:
                    await asyncio.sleep(0.5)
                    with suppress(Exception):  # PostgreSQL may be away, which is what the run is about
                        done, waiting = await looks.done_and_waiting(stage.engine)
                        now = time.monotonic()
                        rate, last, before = (done - last) / (now - before), done, now
                        status.update(f"{done:,} jobs done, {rate:.0f}/s, {waiting:,} waiting or running")

            task = asyncio.create_task(follow())
            try:
                yield
            finally:
                task.cancel()

    def conclude(
        self,
        rows: Sequence[Row],
        found: Findings,
        *,
        seed: str,
        seconds: float,
        measured: Sequence[dict[str, Any]],
        exits: Sequence[str],
    ) -> int:
        """The table, who offended against what, and the last line; 0 when every invariant held."""
        self._console.print(_table(rows))
        if not found.offences:
            self._console.print("Nothing lost, nothing twice, nothing stale: every invariant held.", style="bold green")
        for figures in measured:
            self._console.print(f"measured: {json.dumps(figures)}", markup=False)
        for invariant in sorted(found.broken):
            against = [offence for offence in found.offences if offence.invariant == invariant]
            self._console.print(f"{invariant}: {len(against)} offenders, for example", style="bold red")
            for offence in against[:_SHOWN]:
                self._console.print(f"  {offence.subject}: {offence.why}", style="red", markup=False)
        last = {
            "lost": found.count("lost"),
            "phantoms": found.count("phantoms"),
            "repeated_effects": found.count("repeated_effects"),
            "stale_accepted": found.count("stale_accepted"),
            "jobs": found.jobs,
            "faults": sum(row.times for row in rows),
            "seed": seed,
            "seconds": round(seconds, 1),
            "faulted_jobs": sum(row.jobs for row in rows),
            "ran_again": found.ran_again,
            "stale_refused": found.stale_refused,
            "broken": sorted(found.broken),
            "worker_exits": len(exits),
            "by_fault": {row.fault: _figures(row) for row in rows},
            "measured": measured,
        }
        print(json.dumps(last), flush=True)
        return 1 if found.offences else 0


def _figures(row: Row) -> dict[str, Any]:
    """What the docs quote of one fault: seconds, and shares of the work before."""

    def summary(values: Sequence[float]) -> dict[str, float]:
        if not values:
            return {}
        halves = {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)}
        return {"n": len(values), **{name: round(value, 3) for name, value in halves.items() if value is not None}}

    return {
        "times": row.times,
        "jobs": row.jobs,
        "again_s": summary(row.again),
        "first_job_after_return_s": summary(row.first_back),
        **{f"start_{name}_s": summary(values) for name, values in row.start.items()},
        "not_enqueued": row.not_enqueued,
        "work_during": [round(share, 2) for share in row.during],
        "work_after": [round(share, 2) for share in row.after],
    }


def _table(rows: Sequence[Row]) -> Table:
    table = Table("fault", caption="again: from the blow until what it cut short runs anew; work: as a share of before")
    for column in ("times", "jobs", "lost", "phantoms", "repeated", "stale refused", "cut short"):
        table.add_column(column, justify="right")
    for column in ("again p50", "p99", "work during", "after"):
        table.add_column(column, justify="right")
    for row in rows:
        counted = (row.times, row.jobs, row.lost, row.phantoms, row.repeated, row.stale_refused, len(row.again))
        table.add_row(
            row.fault,
            *(f"{number:,}" for number in counted),
            _seconds(percentile(row.again, 0.5)),
            _seconds(percentile(row.again, 0.99)),
            f"{median(row.during):.0%}" if row.during else "",
            f"{median(row.after):.0%}" if row.after else "",
        )
    return table


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
