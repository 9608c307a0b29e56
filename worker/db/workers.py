"""The rows of the worker processes: they say who is alive, and nothing of jobs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Select, Uuid, and_, bindparam, delete, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.core.states import JobState
from worker.db.models import Job, Worker, constant
from worker.db.transitions import Held


async def register(connection: AsyncConnection, worker_id: UUID, *, queues: Sequence[str], concurrency: int) -> None:
    """From now on this process is alive under this id."""
    await connection.execute(
        insert(Worker).values(
            id=worker_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=version("exarq"),
            queues=list(queues),
            concurrency=concurrency,
        )
    )


class Beaten(NamedTuple):
    """What a beat found: whether the worker's row is there, and its running jobs, each with whether to cancel it.

    None where it did not look for these.
    """

    alive: bool
    running: dict[Held, bool] | None


_me = bindparam("worker_id", type_=Uuid)
_MOVE = update(Worker).where(Worker.id == _me).values(beat=Worker.beat + 1, beat_at=func.clock_timestamp())


def _move_and_look() -> Select[Any]:
    moved = _MOVE.returning(Worker.id).cte("moved")
    there = select((func.count() > 0).label("there")).select_from(moved).subquery()
    mine = and_(Job.worker_id == _me, Job.state == constant(JobState.RUNNING))
    return select(there.c.there, Job.id, Job.token, Job.cancel_requested).select_from(there.outerjoin(Job, mine))


_MOVE_AND_LOOK = _move_and_look()


async def beat(connection: AsyncConnection, worker_id: UUID, *, looks: bool = True) -> Beaten:
    """Still alive, unless somebody has given this worker up; and what runs under its id, in the same round trip.

    Where a snapshot is held open for long, the look goes through all that has run here since; who has no time for it
    beats without.
    """
    if not looks:
        return Beaten((await connection.execute(_MOVE, {"worker_id": worker_id})).rowcount > 0, None)
    rows = (await connection.execute(_MOVE_AND_LOOK, {"worker_id": worker_id})).all()
    return Beaten(rows[0].there, {Held(row.id, row.token): row.cancel_requested for row in rows if row.token})


async def announce_stop(connection: AsyncConnection, worker_id: UUID) -> None:
    """What runs here from now on is cut short by a stop, not by a crash."""
    await connection.execute(update(Worker).where(Worker.id == worker_id).values(stopping_at=func.clock_timestamp()))


async def unregister(connection: AsyncConnection, worker_id: UUID) -> None:
    """Delete the worker's row, unless jobs still run under its id: then the rescue needs it."""
    running = select(Job.id).where(Job.worker_id == worker_id, Job.state == constant(JobState.RUNNING))
    await connection.execute(delete(Worker).where(Worker.id == worker_id, ~running.exists()))


_LOCK = text("SELECT pg_try_advisory_xact_lock(:space, hashtext(:worker))")
_RESCUE_SPACE = 0x657861  # "exa"


async def lock_for_rescue(connection: AsyncConnection, worker_id: UUID) -> bool:
    """One rescuer at a time for this worker, until the transaction ends."""
    return bool((await connection.execute(_LOCK, {"space": _RESCUE_SPACE, "worker": str(worker_id)})).scalar())


async def still_silent(connection: AsyncConnection, worker_id: UUID, seen: int | None) -> tuple[bool, bool]:
    """Whether the beat is the one that was seen (None: no row), holding it there; and whether a stop was announced."""
    query = select(Worker.beat, Worker.stopping_at).where(Worker.id == worker_id).with_for_update()
    row = (await connection.execute(query)).first()
    if row is None:
        return seen is None, False
    return row.beat == seen, row.stopping_at is not None


_END_BACKENDS = text(
    "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
    " WHERE application_name = :name AND usename = current_user AND pid <> pg_backend_pid()"
)


async def end_backends(connection: AsyncConnection, application_name: str) -> None:
    """End what a worker left connected, and wait for it: a zombie's transaction holds the locks of its jobs."""
    await connection.execute(_END_BACKENDS, {"name": application_name})
