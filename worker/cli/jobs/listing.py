"""`exarq jobs list`: the newest jobs that match."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import UTC, datetime

from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncSession

from worker.cli.database import migrated_database
from worker.cli.errors import shortened
from worker.cli.output import Column, ago, length, note, print_json, print_table, short, state_text
from worker.core.errors import ArgumentsInvalid, nearest
from worker.db import reads
from worker.db.reads import SHOWN_STATES, JobLine
from worker.settings import load_settings


def print_list(*, state: str | None, name: str | None, queue: str | None, limit: int, as_json: bool) -> None:
    """Print the newest jobs that match."""
    check_state(state)
    lines = asyncio.run(_read(state, name, queue, limit))
    if as_json:
        print_json([dataclasses.asdict(line) for line in lines])
    elif lines:
        _print_lines(lines)
    if not lines:
        note("no jobs match" if state or name or queue else "there are no jobs yet")
    elif len(lines) == limit:
        note(f"the newest {limit} only; --limit shows more")


def check_state(state: str | None) -> None:
    """Raise `ArgumentsInvalid` for a state that there is not."""
    if state is not None and state not in SHOWN_STATES:
        raise ArgumentsInvalid(f"no state {state!r}; there are {', '.join(SHOWN_STATES)}{nearest(state, SHOWN_STATES)}")


async def _read(state: str | None, name: str | None, queue: str | None, limit: int) -> list[JobLine]:
    async with migrated_database(load_settings()) as engine, AsyncSession(engine) as session:
        return await reads.jobs(session, state=state, name=name, queue=queue, limit=limit)


def _print_lines(lines: list[JobLine]) -> None:
    columns = [Column("id"), Column("state"), Column("attempts"), Column("when"), Column("name", folds=True)]
    several = {line.queue for line in lines} != {"default"}
    if several:
        columns.append(Column("queue", folds=True))
    rows: list[list[str | Text]] = [
        [
            short(line.id),
            state_text(line.state),
            str(line.attempt),
            _when(line),
            line.name,
            *([line.queue] if several else []),
            shortened(line.error or ""),
        ]
        for line in lines
    ]
    print_table(columns, rows, last="error")


def _when(line: JobLine) -> str:
    """When it ended, since when it runs, or when it is due."""
    if line.state == "running" and line.started_at is not None:
        return f"for {length(datetime.now(UTC) - line.started_at)}"
    if line.finished_at is not None:
        return ago(line.finished_at)
    due = ago(line.run_at)
    return due if due.startswith("in ") else f"due {due}"
