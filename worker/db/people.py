"""The moves that a person makes of jobs they name: again, and gone; and `transitions.request_cancel` of many.

Each is guarded by the state, and by those states that the person has named. A move of many rows passes by those that
another transaction holds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.core.states import JobState
from worker.db.statements.again import FREE_FOR, RETRY, RETRY_MANY
from worker.db.statements.cancel import REQUEST_CANCEL_MANY
from worker.db.statements.delete import DELETE_MANY
from worker.db.transitions import CancelRequest

Wanted: TypeAlias = Collection[JobState] | None
"""The states that a person has named; None: whichever the job is in."""


@dataclass(frozen=True, slots=True)
class Again:
    """How a job stood that a person wants once more, whether it was moved or why not, and what its hint needs."""

    job_id: UUID
    stood: JobState
    moved: bool
    key_is_taken: bool
    asked_after: bool
    name: str
    queue: str
    enqueued_ms: float
    installation: UUID
    priority: int


@dataclass(frozen=True, slots=True)
class Deletion:
    """How a job stood that a person wants gone, and whether it is."""

    job_id: UUID
    stood: JobState
    moved: bool
    asked_after: bool


def retry(connection: Connection, job_id: UUID) -> Again | None:
    """Final → queued, due at once, with nothing counted against it; None when there is no such job.

    Waits for a transaction that moves the job just now. The job stays as it is while another holds its unique key, and
    a success for a minute while its worker lives: that may still ask whether its COMMIT took place.

    Raises: `IntegrityError` where another transaction has taken its unique key meanwhile.
    """
    connection.execute(FREE_FOR, {"ids": [job_id]})
    rows = connection.execute(RETRY, {"ids": [job_id], "states": None}).all()
    return next(iter(_again(rows)), None)


async def retry_many(connection: AsyncConnection, ids: Sequence[UUID], *, states: Wanted = None) -> list[Again]:
    """Final → queued, as `retry`, for those in `states`; of several with one unique key the newest gets it."""
    await connection.execute(FREE_FOR, {"ids": sorted(ids)})
    rows = await connection.execute(RETRY_MANY, {"ids": sorted(ids), "states": _named(states)})
    return _again(rows.all())


async def request_cancel_many(
    connection: AsyncConnection, ids: Sequence[UUID], reason: str, *, states: Wanted = None
) -> list[tuple[UUID, CancelRequest, bool]]:
    """Queued → cancelled, running: flagged, for those in `states`; each job with whether it was in them."""
    parameters = {"ids": sorted(ids), "reason": reason, "states": _named(states)}
    rows = (await connection.execute(REQUEST_CANCEL_MANY, parameters)).all()
    return [(id_, CancelRequest(JobState(state), *rest), wanted) for id_, state, *rest, wanted in rows]


async def delete_many(connection: AsyncConnection, ids: Sequence[UUID], *, states: Wanted = None) -> list[Deletion]:
    """Final → gone, with its attempts, for those in `states`; the same young successes stay as with `retry`."""
    rows = (await connection.execute(DELETE_MANY, {"ids": sorted(ids), "states": _named(states)})).all()
    return [Deletion(id_, JobState(state), *rest) for id_, state, *rest in rows]


def _again(rows: Sequence[Any]) -> list[Again]:
    return [Again(id_, JobState(state), *rest) for id_, state, *rest in rows]


def _named(states: Wanted) -> list[str] | None:
    return None if states is None else sorted(states)
