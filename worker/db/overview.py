"""How the queues and the workers stand, for people: by the indexes of the states, never by all of history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Interval, and_, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.core.states import FINAL, JobState
from worker.db.models import Job, Worker, constant


@dataclass(slots=True)
class QueueLine:
    """One queue.

    Args:
        queue: its name.
        waiting: jobs that are due and have not failed.
        scheduled: jobs that are due later.
        retrying: jobs that wait again after a failure or a crash.
        running: jobs that run.
        oldest_due: how long the job has been due that waits longest; None when none is due.
        done: how many jobs have ended within the last hour, by state.
        workers: how many living workers take from it.

    """

    queue: str
    waiting: int = 0
    scheduled: int = 0
    retrying: int = 0
    running: int = 0
    oldest_due: timedelta | None = None
    done: dict[str, int] = field(default_factory=dict)
    workers: int = 0


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """One worker process that has a row; `silent_for` is since its last beat, by PostgreSQL's clock."""

    id: UUID
    host: str
    pid: int
    version: str
    queues: Sequence[str]
    concurrency: int
    running: int
    started_at: datetime
    beat_at: datetime
    silent_for: timedelta
    stopping_at: datetime | None


_now = func.statement_timestamp()
_again = (Job.failures > 0) | (Job.crashes > 0)
_due = Job.run_at <= _now

WAITING = (
    select(
        Job.queue,
        func.count().filter(~_again, _due),
        func.count().filter(~_again, ~_due),
        func.count().filter(_again),
        func.max(_now - Job.run_at).filter(_due).cast(Interval),
    )
    .where(Job.state == constant(JobState.QUEUED))
    .group_by(Job.queue)
)
RUNNING = select(Job.queue, func.count()).where(Job.state == constant(JobState.RUNNING)).group_by(Job.queue)
DONE = (
    select(Job.queue, Job.state, func.count())
    .where(
        Job.state.in_([constant(state) for state in sorted(FINAL)]),
        Job.finished_at > _now - literal_column("interval '1 hour'", Interval),
    )
    .group_by(Job.queue, Job.state)
)


async def queues(connection: AsyncConnection, *, lease: timedelta) -> dict[str, QueueLine]:
    """Every queue in which something waits, runs, or has ended within the hour, or that a living worker serves."""
    found: dict[str, QueueLine] = {}

    def line(queue: str) -> QueueLine:
        return found.setdefault(queue, QueueLine(queue))

    for queue, *counts, oldest in await connection.execute(WAITING):
        line(queue).waiting, line(queue).scheduled, line(queue).retrying = counts
        line(queue).oldest_due = oldest
    for queue, count in await connection.execute(RUNNING):
        line(queue).running = count
    for queue, state, count in await connection.execute(DONE):
        line(queue).done[state] = count
    for worker in await workers(connection):
        for queue in worker.queues if worker.silent_for <= lease else ():
            line(queue).workers += 1
    return dict(sorted(found.items()))


async def workers(connection: AsyncConnection) -> list[WorkerLine]:
    """Every worker that has a row, the oldest first."""
    running = (
        select(func.count())
        .where(and_(Job.worker_id == Worker.id, Job.state == constant(JobState.RUNNING)))
        .scalar_subquery()
    )
    columns: Any = [
        *(Worker.id, Worker.host, Worker.pid, Worker.version, Worker.queues, Worker.concurrency),
        running,
        *(Worker.started_at, Worker.beat_at, (_now - Worker.beat_at).cast(Interval), Worker.stopping_at),
    ]
    return [WorkerLine(*row) for row in await connection.execute(select(*columns).order_by(Worker.started_at))]


async def waiting_names(connection: AsyncConnection, *, most: int) -> dict[str, int]:
    """The names of the jobs that wait, with how many there are; the most frequent."""
    counted = func.count()
    query = (
        select(Job.name, counted)
        .where(Job.state == constant(JobState.QUEUED))
        .group_by(Job.name)
        .order_by(counted.desc())
        .limit(most)
    )
    return dict((await connection.execute(query)).all())
