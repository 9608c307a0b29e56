"""What the audience sees: the story and its bars on stderr, the proof on stdout, its last line for programs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from worker.demo.proof import Findings

_PLAIN_EVERY: Final = 1.0


class Screen:
    """Says what happens as it happens; live bars on a terminal, plain lines elsewhere.

    Args:
        json_only: nothing but the last line, and what went wrong.

    """

    def __init__(self, *, json_only: bool) -> None:
        self._began = time.monotonic()
        self._json_only = json_only
        self._console = Console(stderr=True, highlight=False, quiet=json_only, soft_wrap=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._plain_after = 0.0

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._began

    def say(self, words: str, style: str = "") -> None:
        """One line of the story, with its time."""
        self._console.print(f"[dim]{self.seconds:5.1f} s[/dim]  " + (f"[{style}]{words}[/{style}]" if style else words))

    def plain(self, words: str = "") -> None:
        """One line without a time."""
        self._console.print(words)

    def complain(self, words: str) -> None:
        """What went wrong, also for those who want JSON only."""
        Console(stderr=True, highlight=False, soft_wrap=True).print(words, markup=False, style="red")

    @contextlib.contextmanager
    def bars(self, *names: str) -> Iterator[None]:
        """Show one bar for each name while the block lasts."""
        if not self._console.is_terminal or self._json_only:
            yield
            return
        columns = (TextColumn("         {task.description:<10}"), BarColumn(40), MofNCompleteColumn())
        with Progress(*columns, console=self._console, transient=True) as self._bars:
            self._tasks = {name: self._bars.add_task(name, total=None) for name in names}
            try:
                yield
            finally:
                self._bars = None

    def show(self, **progress: tuple[int, int]) -> None:
        """How far things are: name → how many of how many."""
        if self._bars is not None:
            for name, (done, total) in progress.items():
                self._bars.update(self._tasks[name], completed=done, total=total)
        elif self.seconds >= self._plain_after:
            self._plain_after = self.seconds + _PLAIN_EVERY
            self.say(", ".join(f"{done:,} of {total:,} {name}" for name, (done, total) in progress.items()), "dim")

    def table(self, found: Findings) -> None:
        """The proof, on stdout."""
        if self._json_only:
            return
        table = Table(title="The proof: the business tables against the producers' file")
        table.add_column("what")
        table.add_column("jobs", justify="right")
        table.add_row("committed: orders and catalogue jobs", f"{found.enqueued:,}")
        table.add_row("rolled back", f"{found.rolled_back:,}")
        table.add_row("placed: committed + rolled back", f"{found.placed:,}", end_section=True)
        table.add_row("succeeded, of those committed", f"{found.succeeded:,}")
        table.add_row("follow-ups enqueued by jobs", f"{found.follow_ups:,}")
        table.add_row("done: committed + follow-ups", f"{found.done:,}", end_section=True)
        for words, number in {
            "lost: committed, but its effect is missing": found.lost,
            "repeated: its effect is there more than once": found.repeated_effects,
            "phantoms: an effect that no commit asked for": found.phantoms,
            "out of step: a result without its effect, or the reverse": found.out_of_step,
        }.items():
            colour = "red" if number else "green"
            table.add_row(f"[{colour}]{words}[/{colour}]", f"[{colour}]{number:,}[/{colour}]")
        Console(highlight=False).print(table)

    def last_line(self, report: Mapping[str, object]) -> None:
        """The report as one line of JSON, the last on stdout."""
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
