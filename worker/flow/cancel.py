"""Cancel: ask, in the caller's own transaction, that a job ends; its worker is told once that has committed."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from worker.broker.messages import CancelAsked, Cancelled
from worker.core.states import JobState
from worker.db import transitions
from worker.db.failures import schema_needed
from worker.db.models import Job
from worker.db.transitions import CancelRequest
from worker.flow.after_commit import destination_of, publish_after_commit
from worker.flow.handle import Handle, id_of
from worker.flow.holdings import Because
from worker.flow.in_session import SyncSession, in_session


@dataclass(frozen=True, slots=True)
class Cancellation:
    """What asking to cancel a job came to.

    Args:
        job_id: the job's id.
        outcome: `cancelled`: it waited, and will not run; `requested`: it runs, and its worker ends it, unless it
            succeeds before; `final`: it had ended already; `unknown`: there is no such job.
        state: the job's state from here on, None where there is no such job.

    """

    job_id: UUID
    outcome: Literal["cancelled", "requested", "final", "unknown"]
    state: JobState | None


@overload
def cancel(session: AsyncSession, job: UUID | Handle[Any]) -> Coroutine[Any, Any, Cancellation]: ...
@overload
def cancel(session: SyncSession, job: UUID | Handle[Any]) -> Cancellation: ...
def cancel(session: AsyncSession | SyncSession, job: UUID | Handle[Any]) -> Any:
    """Ask in the session's transaction that this job ends: it counts if, and only if, that commits.

    A job that waits is cancelled and will not run. One that runs is cancelled at its next await, and what it wrote is
    rolled back; if it returns all the same, it has succeeded. Until the commit nobody else can move the job.

    Args:
        session: the caller's session; with a sync one, nothing is awaited.
        job: the job's id, or its handle.

    Raises:
        TypeError: it is neither.
        SchemaNotMigrated: the database has no tables of Exarq.
        SettingsError: no publisher is bound to the session and no Redis address is set.

    """
    return in_session(session, _cancel, id_of(job))


def _cancel(session: Session, job_id: UUID) -> Cancellation:
    destination = destination_of(session)
    connection = session.connection(bind_arguments={"mapper": Job})
    with schema_needed():
        request = transitions.request_cancel(connection, job_id, Because.CANCEL_REQUESTED)
    if request is not None and (message := message_of(job_id, request)) is not None:
        publish_after_commit(session, connection, destination, [message])
    return _came_to(job_id, request)


def message_of(job_id: UUID, request: CancelRequest) -> CancelAsked | Cancelled | None:
    """What the workers are told once the request is committed; None where nothing came of it."""
    if request.stood is JobState.QUEUED:
        return Cancelled(job_id, request.installation)
    if request.stood is JobState.RUNNING and request.worker_id is not None:
        return CancelAsked(job_id, request.worker_id, request.installation)
    return None


def _came_to(job_id: UUID, request: CancelRequest | None) -> Cancellation:
    if request is None:
        return Cancellation(job_id, "unknown", None)
    match request.stood:
        case JobState.QUEUED:
            return Cancellation(job_id, "cancelled", JobState.CANCELLED)
        case JobState.RUNNING:
            return Cancellation(job_id, "requested", JobState.RUNNING)
        case _:
            return Cancellation(job_id, "final", request.stood)
