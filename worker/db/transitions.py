"""Every move of a job, each one function named as its verb; nothing else writes a state, but `people` beside it.

Each locks its rows before it updates them. A move by a worker is guarded by `state = running and token = mine`; where
no row answers, somebody else holds the job and nothing was changed. A move of many rows passes by those that another
transaction holds; one of a single row fails at once (`worker.db.failures.is_contention`) or waits, as it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.core.blame import SUSPECT_FROM
from worker.core.outcome import ErrorText
from worker.core.remarks import NOTHING, Remarks
from worker.core.states import Ending, JobState
from worker.db.driver import literal
from worker.db.send import Fetch, fetch
from worker.db.statements.adopt import ADOPT
from worker.db.statements.cancel import REQUEST_CANCEL
from worker.db.statements.claim import CLAIM_BEHIND, CLAIM_BY_ID, CLAIM_BY_SCAN
from worker.db.statements.hold import HOLD
from worker.db.statements.leave import LEAVE_ONE, RELEASE_MANY, RESCUE
from worker.db.statements.progress import NOTE_PROGRESS
from worker.db.statements.prune import PRUNE
from worker.db.statements.succeed import SUCCEED, SUCCEED_HERE, SUCCEED_MANY, SUCCEED_MANY_REMARKED, SUCCEED_REMARKED
from worker.db.statements.unique import FREE, REPLACE

# Named tuples are made, hashed and compared several times for each job, at a third of a frozen dataclass's price.


class Held(NamedTuple):
    """A running job and the token that allows to write it."""

    job_id: UUID
    token: UUID


class ClaimedJob(NamedTuple):
    """What a claim returns of a job: all that its run needs."""

    held: Held
    name: str
    queue: str
    args: str
    attempt: int
    failures: int
    crashes: int
    contended: int
    enqueued_at: datetime
    overdue: timedelta
    expired_at: datetime | None

    @property
    def suspect(self) -> bool:
        """Whether workers died while this job ran there: at most one such job runs in a process."""
        return self.crashes >= SUSPECT_FROM


@dataclass(frozen=True, slots=True)
class Moved:
    """Where a job went that did not succeed, and how long until it is due again."""

    job_id: UUID
    name: str
    queue: str
    state: JobState
    wait: timedelta
    enqueued_at: datetime
    ending: Ending
    priority: int


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """How a job stood when somebody asked to cancel it, and where it runs; the installation is its database's."""

    stood: JobState
    worker_id: UUID | None
    installation: UUID


# ── – → queued, failed ──────────────────────────────────────────────────────────────────────────────────────────────


async def adopt(connection: AsyncConnection, arrays: Mapping[str, Sequence[Any]]) -> list[UUID]:
    """– → queued, or failed where there is an error, for what plain ARQ code enqueued; the ids of those that are new.

    An enqueue that has a row keeps it, whoever adopts it again.
    """
    return list((await connection.execute(ADOPT, arrays)).scalars())


# ── queued → running ────────────────────────────────────────────────────────────────────────────────────────────────


async def claim(
    connection: AsyncConnection,
    ids: Sequence[UUID],
    *,
    token: UUID,
    worker_id: UUID,
    may_take_suspect: bool,
    fetch: Fetch = fetch,
) -> list[ClaimedJob]:
    """Queued → running, by primary key: those of `ids` that are due and that nobody else is moving."""
    parameters = {"ids": sorted(ids), "new_token": token, "me": worker_id, "may_take_suspect": may_take_suspect}
    return _claimed(token, await fetch(connection, CLAIM_BY_ID, parameters))


async def claim_by_scan(
    connection: AsyncConnection,
    queues: Sequence[str],
    *,
    room: int,
    token: UUID,
    worker_id: UUID,
    may_take_suspect: bool,
) -> list[ClaimedJob]:
    """Queued → running without Redis: of these queues the first by rank among the longest due.

    Where none of those can be had, others hold them: then the longest due that nobody holds.
    """
    parameters = {
        "queues": list(queues),
        "room": room,
        "new_token": token,
        "me": worker_id,
        "may_take_suspect": may_take_suspect,
    }
    rows = (await connection.execute(CLAIM_BY_SCAN, parameters)).all()
    return _claimed(token, rows or (await connection.execute(CLAIM_BEHIND, parameters)).all())


def _claimed(token: UUID, rows: Sequence[Any]) -> list[ClaimedJob]:
    return [ClaimedJob(Held(row[0], token), *row[1:]) for row in rows]


# ── running → succeeded ─────────────────────────────────────────────────────────────────────────────────────────────


def succeed(connection: Connection, held: Held, result: str, remarks: Remarks = NOTHING) -> bool:
    """Running → succeeded inside the attempt's own transaction; False when this attempt no longer holds the job.

    Waits for another transaction that holds the row. Notable remarks leave an attempt.
    """
    parameters = {"job_id": held.job_id, "mine": held.token, "json": result}
    if not remarks.notable:
        return connection.execute(SUCCEED, parameters).first() is not None
    return connection.execute(SUCCEED_REMARKED, {**parameters, **_told(remarks)}).first() is not None


def success_of(held: Held, result: str) -> str:
    """Running → succeeded as SQL for the message of the COMMIT itself; it fails where somebody else holds the job.

    Without remarks. Waits for another transaction that holds the row.
    """
    return f"SELECT {SUCCEED_HERE}('{held.job_id}', '{held.token}', {literal(result)});"


async def succeed_many(
    connection: AsyncConnection, results: Mapping[Held, str], remarks: Mapping[Held, Remarks] | None = None
) -> set[Held]:
    """Running → succeeded for jobs that wrote nothing, in one statement; returns those whose success it stored.

    Those with notable remarks leave an attempt each.
    """
    parameters: dict[str, list[Any]] = {
        "job_id": [held.job_id for held in results],
        "mine": [held.token for held in results],
        "json": list(results.values()),
    }
    notable = {held: _told(remark) for held, remark in (remarks or {}).items() if remark.notable}
    if not notable:
        held = list(results)
        return {held[number - 1] for number in (await connection.execute(SUCCEED_MANY, parameters)).scalars()}
    told = [notable.get(held) or _told(NOTHING) for held in results]
    parameters |= {name: [one[name] for one in told] for name in _told(NOTHING)}
    return {Held(*row) for row in await connection.execute(SUCCEED_MANY_REMARKED, parameters)}


def _told(remarks: Remarks) -> dict[str, Any]:
    lazy_loads = None if remarks.lazy_loads is None else json.dumps(remarks.lazy_loads)
    return {"blocked": remarks.blocked, "lazy_loads": lazy_loads}


def hold(connection: Connection, held: Held) -> bool:
    """No move: keep the job running under this token until the transaction ends; False when it no longer is.

    Waits for another transaction that holds the row.
    """
    return connection.execute(HOLD, {"job_id": held.job_id, "mine": held.token}).first() is not None


# ── running → queued, failed, cancelled ─────────────────────────────────────────────────────────────────────────────


async def _leave_one(
    connection: AsyncConnection,
    held: Held,
    state: JobState,
    ending: Ending,
    *,
    wait: timedelta = timedelta(0),
    failures: int = 0,
    contended: int = 0,
    error: str | None = None,
    traceback: str | None = None,
    remarks: Remarks = NOTHING,
) -> Moved | None:
    # Fails at once where another transaction holds the row.
    parameters = {
        "job_id": held.job_id,
        "mine": held.token,
        "state": state,
        "ending": ending,
        "wait": wait,
        "failures": failures,
        "contended": contended,
        "error": error,
        "traceback": traceback,
        **_told(remarks),
    }
    return next(iter(_moved((await connection.execute(LEAVE_ONE, parameters)).all())), None)


def _moved(rows: Sequence[Any]) -> list[Moved]:
    return [
        Moved(id_, name, queue, JobState(state), wait, enqueued_at, Ending(ending), priority)
        for id_, name, queue, state, wait, enqueued_at, ending, priority in rows
    ]


async def retry(
    connection: AsyncConnection,
    held: Held,
    error: ErrorText,
    *,
    wait: timedelta,
    counts: bool,
    remarks: Remarks = NOTHING,
) -> Moved | None:
    """Running → queued after a failed attempt, due again after `wait`; None when the job is no longer held."""
    return await _leave_one(
        connection,
        held,
        JobState.QUEUED,
        Ending.RETRIED,
        wait=wait,
        failures=int(counts),
        contended=int(not counts),
        error=f"{error.type}: {error.message}",
        traceback=error.traceback,
        remarks=remarks,
    )


async def fail(
    connection: AsyncConnection, held: Held, error: ErrorText, *, remarks: Remarks = NOTHING
) -> Moved | None:
    """Running → failed: there will be no more attempts; None when the job is no longer held."""
    return await _leave_one(
        connection,
        held,
        JobState.FAILED,
        Ending.FAILED,
        failures=1,
        error=f"{error.type}: {error.message}",
        traceback=error.traceback,
        remarks=remarks,
    )


async def cancel(connection: AsyncConnection, held: Held, reason: str, *, remarks: Remarks = NOTHING) -> Moved | None:
    """Running → cancelled, because the job said so or somebody asked; None when the job is no longer held."""
    return await _leave_one(connection, held, JobState.CANCELLED, Ending.CANCELLED, error=reason, remarks=remarks)


async def snooze(
    connection: AsyncConnection, held: Held, wait: timedelta, *, remarks: Remarks = NOTHING
) -> Moved | None:
    """Running → queued because the job asked for more time; counts as no failure."""
    return await _leave_one(connection, held, JobState.QUEUED, Ending.SNOOZED, wait=wait, remarks=remarks)


async def release(
    connection: AsyncConnection, held: Held, reason: str, *, wait: timedelta, remarks: Remarks = NOTHING
) -> Moved | None:
    """Running → queued through no fault of the job; counts as no failure."""
    return await _leave_one(
        connection, held, JobState.QUEUED, Ending.RELEASED, wait=wait, error=reason, remarks=remarks
    )


async def release_many(connection: AsyncConnection, held: Sequence[Held], reason: str) -> list[Moved]:
    """Running → queued for all of these that still hold their token; counts as no failure."""
    parameters = {
        "job_id": [one.job_id for one in held],
        "mine": [one.token for one in held],
        "reason": reason,
    }
    return _moved((await connection.execute(RELEASE_MANY, parameters)).all())


# ── running → queued, failed, cancelled: the worker stopped beating ─────────────────────────────────────────────────


async def rescue(
    connection: AsyncConnection, worker_id: UUID, *, had_announced_its_stop: bool, max_crashes: int, reason: str
) -> list[Moved]:
    """Running → queued, or failed at `max_crashes`, for the jobs of a worker that stopped beating.

    A crash is blamed on all jobs that ran there; one after an announced stop on none. The caller
    holds the worker's advisory lock and has seen its beat again in this transaction.
    """
    parameters = {
        "dead": worker_id,
        "had_announced_its_stop": had_announced_its_stop,
        "max_crashes": max_crashes,
        "reason": reason,
    }
    return _moved((await connection.execute(RESCUE, parameters)).all())


# ── queued → queued ─────────────────────────────────────────────────────────────────────────────────────────────────


def replace(connection: Connection, arrays: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    """Queued → queued with other arguments, due time, priority and deadline; the caller holds the rows already."""
    return connection.execute(REPLACE, arrays).all()


async def note_progress(connection: AsyncConnection, said: Mapping[Held, str]) -> None:
    """Keep how far these running jobs have come, as JSON; those that are no longer held stay as they are."""
    parameters = {
        "job_id": [held.job_id for held in said],
        "mine": [held.token for held in said],
        "json": list(said.values()),
    }
    await connection.execute(NOTE_PROGRESS, parameters)


# ── queued → cancelled, running: cancel requested ───────────────────────────────────────────────────────────────────


def request_cancel(connection: Connection, job_id: UUID, reason: str) -> CancelRequest | None:
    """Queued → cancelled; what runs is flagged, what is final stays as it is; None when there is no such job.

    Waits for a transaction that moves the job just now, and keeps the row locked until its own ends.
    """
    row = connection.execute(REQUEST_CANCEL, {"job_id": job_id, "reason": reason}).first()
    return None if row is None else CancelRequest(JobState(row[1]), row[2], row[3])


# ── queued → cancelled: its deadline is over, and somebody wants its key ────────────────────────────────────────────


def free(connection: Connection, name: str, key: str) -> None:
    """Queued → cancelled where the job that has this key has expired; what is final gives it up once its time is over.

    Waits for another transaction that holds the row; a job that may still have its key keeps it.
    """
    connection.execute(FREE, {"wanted_name": name, "wanted_key": key})


# ── final → gone ────────────────────────────────────────────────────────────────────────────────────────────────────


async def prune(connection: AsyncConnection, state: JobState, *, keep: timedelta, batch: int) -> int:
    """Final → gone: delete up to `batch` jobs that ended in `state` longer than `keep` ago, with their attempts."""
    found = await connection.execute(PRUNE, {"state": state, "keep": keep, "batch": batch})
    return int(found.scalar_one())
