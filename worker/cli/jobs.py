"""`exarq jobs`: what the tables say of jobs, for people and as JSON; and an end for those no longer wanted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar, assert_never
from uuid import UUID

import typer
from rich.text import Text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from worker.cli.database import migrated_database
from worker.cli.output import (
    Column,
    ago,
    complain,
    note,
    print_facts,
    print_json,
    print_line,
    print_table,
    readable,
    state_text,
)
from worker.core.errors import ArgumentsInvalid, nearest
from worker.core.states import JobState
from worker.db import reads
from worker.db.failures import is_contention
from worker.db.models import Attempt, Job
from worker.flow.cancel import Cancellation, cancel
from worker.flow.publish import Publisher
from worker.observe.events import CancelNotTold, Event, listen
from worker.settings import Settings, load_settings

T = TypeVar("T")


def print_list(*, state: str | None, name: str | None, queue: str | None, limit: int, as_json: bool) -> None:
    """Print the newest jobs that match."""
    if state is not None and state not in reads.SHOWN_STATES:
        raise ArgumentsInvalid(
            f"no state {state!r}; there are {', '.join(reads.SHOWN_STATES)}{nearest(state, reads.SHOWN_STATES)}"
        )
    lines = _read(lambda session: reads.jobs(session, state=state, name=name, queue=queue, limit=limit))
    if as_json:
        print_json([dataclasses.asdict(line) for line in lines])
    elif lines:
        _print_lines(lines)
    if not lines:
        note("no jobs match" if state or name or queue else "there are no jobs yet")
    elif len(lines) == limit:
        note(f"the newest {limit} only; --limit shows more")


def print_one(text: str, *, as_json: bool) -> None:
    """Print all of one job."""
    job_id = _job_id(text)
    found = _read(lambda session: reads.job(session, job_id))
    if found is None:
        raise _no_such(job_id)
    job, state = found
    if as_json:
        print_json({**_columns(job), "state": state, "attempts": [_columns(attempt) for attempt in job.attempts]})
        return
    print_facts(_facts(job, state))
    for attempt in job.attempts:
        _print_attempt(attempt)


def cancel_one(text: str, *, as_json: bool) -> None:
    """Cancel a job and print what came of it; without Redis its worker sees it a beat later."""
    done = asyncio.run(_cancel(load_settings(), _job_id(text)))
    match done.outcome:
        case "unknown":
            raise _no_such(done.job_id)
        case "final" if done.state is not JobState.CANCELLED:
            complain(f"job {done.job_id} has {done.state} already, so there is nothing to cancel")
            raise typer.Exit(1)
        case "final":
            said = "was cancelled before"
        case "requested":
            said = "runs; its worker was asked to cancel it"
        case "cancelled":
            said = "is cancelled and will not run"
        case _:
            assert_never(done.outcome)
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        print_line(f"job {done.job_id} {said}")


async def _cancel(settings: Settings, job_id: UUID) -> Cancellation:
    publisher = Publisher.from_settings(settings)
    end = listen(_tell)
    try:
        async with migrated_database(settings) as engine, AsyncSession(engine, info=publisher.info) as session:
            done = await cancel(session, job_id)
            await session.commit()
            return done
    except DBAPIError as error:
        if not is_contention(error):
            raise
        complain(f"another transaction keeps job {job_id} locked; try again when it has ended")
        raise typer.Exit(2) from error
    finally:
        await publisher.close()
        end()


def _tell(event: Event) -> None:
    if isinstance(event, CancelNotTold):
        note(f"Redis does not answer ({event.error}); the job's worker sees the request with its next beat")


def _job_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise ArgumentsInvalid(f"{text!r} is not a job's id, such as 0199c0de-0000-7000-8000-000000000000") from None


def _no_such(job_id: UUID) -> typer.Exit:
    complain(f"no job {job_id}; it never existed, was rolled back, or was pruned")
    return typer.Exit(1)


def _read(query: Callable[[AsyncSession], Awaitable[T]]) -> T:
    async def ask() -> T:
        async with migrated_database(load_settings()) as engine, AsyncSession(engine) as session:
            return await query(session)

    return asyncio.run(ask())


def _print_lines(lines: list[reads.JobLine]) -> None:
    columns = [Column("id"), Column("state"), Column("run"), Column("when"), Column("name", folds=True)]
    several = {line.queue for line in lines} != {"default"}
    if several:
        columns.append(Column("queue", folds=True))
    rows: list[list[str | Text]] = [
        [
            str(line.id),
            state_text(line.state),
            str(line.attempt),
            ago(line.finished_at or line.run_at),
            line.name,
            *([line.queue] if several else []),
            line.error or "",
        ]
        for line in lines
    ]
    print_table(columns, rows, last="error")


def _facts(job: Job, state: str) -> dict[str, str | Text]:
    counted = f"{job.attempt} ({job.failures} failed, {job.crashes} crashed)"
    facts: dict[str, Any] = {
        "id": str(job.id),
        "name": job.name,
        "queue": job.queue,
        "state": state_text(state),
        "cancel": "requested" if job.cancel_requested else None,
        "arguments": json.dumps(job.args, ensure_ascii=False),
        "result": json.dumps(job.result, ensure_ascii=False) if state == "succeeded" else None,
        "error": job.error,
        "attempts": counted,
        "enqueued": _moment(job.enqueued_at),
        "first due": _moment(job.first_due_at),
        "due": _moment(job.run_at),
        "started": _moment(job.started_at),
        "finished": _moment(job.finished_at),
        "worker": str(job.worker_id) if job.worker_id else None,
        "token": str(job.token) if job.token else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _print_attempt(attempt: Attempt) -> None:
    print_line("")
    print_line(f"attempt {attempt.number}: {attempt.ending}, {_moment(attempt.finished_at)}", style="bold")
    if attempt.started_at is not None:
        took = (attempt.finished_at - attempt.started_at).total_seconds()
        print_line(f"ran {took:.3f} s on worker {attempt.worker_id}", style="dim")
    said = attempt.traceback or attempt.error
    if said:
        print_line(readable(said.rstrip()))


def _moment(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S %Z} ({ago(moment)})"


def _columns(row: Job | Attempt) -> dict[str, Any]:
    return {column.key: getattr(row, column.key) for column in type(row).__table__.columns}
