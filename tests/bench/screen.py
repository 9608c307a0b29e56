"""What a run shows: how far it is, then the table, its notes, and the targets."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.bench.install import Installed, Missing
from tests.bench.rows import percentile
from tests.bench.targets import Verdict
from tests.bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from tests.bench.run import Measured, Results

_COLUMNS = (
    ("workload", "workload"),
    ("system", "system"),
    ("jobs", "jobs"),
    ("jobs_per_s", "jobs/s"),
    ("p50_ms", "p50 ms"),
    ("p99_ms", "p99 ms"),
    ("cpu_s_per_1000", "CPU s/1000"),
    ("wal_bytes_per_job", "WAL B/job"),
    ("commits_per_job", "commits/job"),
    ("redis_commands_per_job", "Redis/job"),
    ("rss_mb", "RSS MB"),
    ("runs", "runs"),
    ("spread", "spread"),
)


class Screen:
    """The terminal, or a file."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
        self._begun = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def say(self, line: str, style: str = "") -> None:
        """One line, with the time since the start."""
        self._console.print(f"{time.monotonic() - self._begun:6.1f} s  {line}", style=style, markup=False)

    def introduce(self, facts: dict[str, str], commit_ms: float) -> None:
        """On what everything runs."""
        durable = ", ".join(
            f"{name} {value}" for name, value in facts.items() if name not in ("server_version", "redis")
        )
        self.say(
            f"PostgreSQL {facts['server_version']} ({durable}; a commit takes {commit_ms:.2f} ms), {facts['redis']}"
        )
        self.say(
            f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
        )

    def missing(self, missing: Missing) -> None:
        """A system that takes no part."""
        self.say(f"{missing.name} takes no part: {missing.why}", "bold red")

    @contextmanager
    def progress(self, runs: int) -> Iterator[None]:
        """Show how far the runs are while the block lasts."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as self._progress:
            self._task = self._progress.add_task("the first run", total=runs)
            yield
        self._progress = None

    def measured(self, row: Measured, number: int) -> None:
        """A run has ended; the one before the first round is not counted."""
        done = f"{row.workload.key}: {row.system.name}"
        if row.failed:
            self.say(f"{done}: {row.failed}", "red")
        elif number < 0:
            self.say(f"{done}: {row.jobs:,} jobs a run", "dim")
        else:
            run = row.runs[number]
            rate = f"{run.rate:,.0f} jobs/s" if run.rate else ""
            p50 = f"p50 {percentile(run.latencies, 0.5):.1f} ms" if run.latencies else ""
            cpu = f", {run.cpu / run.jobs * 1e6:,.0f} µs of CPU a job" if run.cpu else ""
            self.say(f"{done}: {rate}{p50}{cpu}", "dim")
        if self._progress:
            self._progress.update(self._task, advance=1, description=done)

    def conclude(self, results: Results, rows: Sequence[dict[str, Any]], verdicts: Sequence[Verdict]) -> None:
        """The table and its notes, then the targets."""
        self._console.print(_table(rows))
        for row in results.measured.values():
            if row.failed:
                self._console.print(f"{row.system.name} has no row in {row.workload.key}: {row.failed}", style="red")
        for missing in results.missing:
            self._console.print(f"{missing.name} takes no part: {missing.why}", style="bold red", markup=False)
        for system in results.systems:
            self._console.print(_note(system), markup=False)
        self._console.print(_targets(verdicts))


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        caption="jobs/s: from the first line of the first job until the store says that all have ended; medians of"
        " alternating runs. CPU, WAL, commits, Redis commands: of the workers, counted outside. spread: (most - least) / median."
    )
    for key, title in _COLUMNS:
        table.add_column(title, justify="left" if key in ("workload", "system") else "right")
    last = None
    for row in rows:
        kind = row["workload"] if row["processes"] == 1 else f"{row['workload']} ×{row['processes']}"
        if last not in (None, kind):
            table.add_section()
        cells = {**row, "workload": kind if kind != last else ""}
        table.add_row(*(_cell(cells[key]) for key, _ in _COLUMNS))
        last = kind
    return table


def _targets(verdicts: Sequence[Verdict]) -> Table:
    table = Table("target", "", "", "found", caption="ratios: medians of pairs, each taken within one round")
    for verdict in verdicts:
        met = {True: "[green]met", False: "[red]not met", None: ""}[verdict.met]
        table.add_row(verdict.workload, verdict.target, met, verdict.found)
    return table


def _note(system: Installed) -> str:
    about = system.about
    versions = ", ".join(f"{name} {version}" for name, version in system.versions.items())
    without = dict.fromkeys(workload.name for workload in WORKLOADS if workload.name not in about.workloads)
    return (
        f"{about.name}: {versions}. Keeps: {about.keeps}. Setting: {about.setting} ({about.source})."
        f" Publishes: {about.published}" + (f". Does not do: {', '.join(without)}" if without else "")
    )


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case float() if value < 100:
            return f"{value:g}"
        case float() | int():
            return f"{value:,.0f}"
        case _:
            return str(value)
