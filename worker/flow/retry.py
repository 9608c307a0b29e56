"""Retry by a person: a job that has ended runs once more; its hint goes out after the commit."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal, overload
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from worker.broker.hints import Hint, due_at
from worker.core.states import JobState
from worker.db import people
from worker.db.failures import schema_needed
from worker.db.models import Job
from worker.db.people import Again
from worker.flow.after_commit import destination_of, publish_after_commit
from worker.flow.handle import Handle, id_of
from worker.flow.in_session import SyncSession, in_session


@dataclass(frozen=True, slots=True)
class Retrial:
    """What asking for a job once more came to.

    Args:
        job_id: the job's id.
        outcome: `retried`: it waits and is due now; `not final`: it waits or runs anyway; `key taken`: another job
            holds its unique key; `asked after`: it has succeeded within the last minute, and its worker may still have
            to ask whether it did; `unknown`: there is no such job.
        state: the job's state from here on, None where there is no such job.

    """

    job_id: UUID
    outcome: Literal["retried", "not final", "key taken", "asked after", "unknown"]
    state: JobState | None


@overload
def retry(session: AsyncSession, job: UUID | Handle[Any]) -> Coroutine[Any, Any, Retrial]: ...
@overload
def retry(session: SyncSession, job: UUID | Handle[Any]) -> Retrial: ...
def retry(session: AsyncSession | SyncSession, job: UUID | Handle[Any]) -> Any:
    """Queue in the session's transaction a job that has ended: it runs again if, and only if, that commits.

    Its failures and crashes are forgotten, its attempts stay and are numbered on. One that has succeeded runs again
    too. Until the commit nobody else can move the job.

    Args:
        session: the caller's session; with a sync one, nothing is awaited.
        job: the job's id, or its handle.

    Raises:
        TypeError: it is neither.
        SchemaNotMigrated: the database has no tables of Exarq.
        SettingsError: no publisher is bound to the session and no Redis address is set.

    """
    return in_session(session, _retry, id_of(job))


def _retry(session: Session, job_id: UUID) -> Retrial:
    destination = destination_of(session)
    connection = session.connection(bind_arguments={"mapper": Job})
    try:
        with schema_needed(), connection.begin_nested():
            again = people.retry(connection, job_id)
    except IntegrityError:  # another transaction took the key between the look and the move
        with connection.begin_nested():
            again = people.retry(connection, job_id)
    if again is not None and again.moved:
        publish_after_commit(session, connection, destination, [hint_of(again)])
    return Retrial(job_id, *came_to(again))


def hint_of(again: Again) -> Hint:
    """The hint of a job that is due now."""
    return Hint(
        again.job_id, again.name, again.queue, due_at(0.0), int(again.enqueued_ms), again.installation, again.priority
    )


def came_to(
    again: Again | None,
) -> tuple[Literal["retried", "not final", "key taken", "asked after", "unknown"], JobState | None]:
    """The outcome of a retrial, and the job's state from here on."""
    if again is None:
        return "unknown", None
    if again.moved:
        return "retried", JobState.QUEUED
    if again.asked_after:
        return "asked after", again.stood
    return ("key taken" if again.key_is_taken else "not final"), again.stood
