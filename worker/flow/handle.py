"""What whoever enqueued a job holds of it, and how they learn what became of it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, Literal, TypeAlias, cast, overload
from uuid import UUID

from pydantic_core import from_json
from sqlalchemy import Connection, Engine
from sqlalchemy.engine import Transaction
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import TypeVar

from worker.core.errors import JobCancelled, JobFailed, NotCommitted, ResultTimeout
from worker.core.registry import Definition, default_registry
from worker.core.signature import Signature
from worker.core.states import Ending, JobState
from worker.db.ends import Stand
from worker.db.failures import is_transient
from worker.db.models import Job
from worker.flow.after_commit import OUTBOX, Destination, destination_of, was_rolled_back
from worker.flow.publish import Publisher, default_publisher
from worker.flow.waiting import look

Happened: TypeAlias = Literal["created", "exists", "replaced"]

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True, default=Any)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a job was enqueued: its database, who told the workers, and in which transaction."""

    engine: Engine
    destination: Destination
    transaction: Transaction | None = None

    @classmethod
    def of(cls, connection: Connection, destination: Destination) -> Origin:
        """The origin of what is enqueued on this connection now."""
        return cls(connection.engine, destination, connection.get_transaction())

    @property
    def was_rolled_back(self) -> bool:
        """Whether its transaction is known to have been."""
        return self.transaction is not None and was_rolled_back(self.transaction)


@dataclass(frozen=True, slots=True)
class Handle(Generic[R_co]):
    """A job that was enqueued; it exists once the transaction commits.

    Args:
        id: the job's id, which `exarq jobs show` takes.
        name: the name of its definition; empty where only the id was known.
        happened: "created"; or what became of an enqueue whose key a job had: that one "exists", or was "replaced".

    """

    id: UUID
    name: str
    happened: Happened = "created"
    _origin: Origin | None = field(default=None, repr=False, compare=False)
    _signature: Signature | None = field(default=None, repr=False, compare=False)

    async def result(self, timeout: float | timedelta | None = None) -> R_co:
        """What the job returned, once it has succeeded; to be asked for after the commit.

        Args:
            timeout: seconds, or a timedelta; 0 looks once, None waits for as long as it takes. The job goes on after
                a timeout as before, and may be asked for again.

        Raises:
            JobFailed: the job has failed.
            JobCancelled: the job was cancelled.
            ResultTimeout: it has not ended in time, there is no such job, or PostgreSQL does not answer; also a
                `TimeoutError`.
            NotCommitted: the transaction that enqueued it goes on; or it was rolled back, and no timeout is given: not
                known of a savepoint, of a COMMIT that failed, or where only the id was, so there it waits.
            ResultInvalid: what is stored does not fit the function's return annotation, as after a change of its code.

        """
        limit = _seconds(timeout)
        origin = self._checked_origin()
        # It would wait for ever; a job that has the key, or that was replaced, is not of this transaction.
        if limit is None and self.happened == "created" and origin.was_rolled_back:
            raise NotCommitted(self.id, self.name, rolled_back=True)
        engine = AsyncEngine(origin.engine)
        stand = await self._until_ended(engine, origin, limit)
        return cast("R_co", _result_of(stand, self._signature))

    async def _until_ended(self, engine: AsyncEngine, origin: Origin, limit: float | None) -> Stand:
        publisher = origin.destination if isinstance(origin.destination, Publisher) else default_publisher()
        timer = asyncio.timeout(limit)
        try:
            async with timer:
                return await publisher.waiting.until_ended(engine, self.id)
        except TimeoutError:
            if not timer.expired():
                raise
        stand = await self._last_look(engine, limit or 0)
        if stand is None or not stand.has_ended:
            raise ResultTimeout(self.id, self.name or (stand.name if stand else ""), limit or 0, _now(stand))
        return stand

    async def _last_look(self, engine: AsyncEngine, limit: float) -> Stand | None:
        try:
            return (await look(engine, [self.id])).get(self.id)
        except Exception as error:
            if not is_transient(error):
                raise
            now = f"PostgreSQL does not answer ({type(error).__name__}), so how it stands is not known; ask again"
            raise ResultTimeout(self.id, self.name, limit, now) from error

    def _checked_origin(self) -> Origin:
        origin = self._origin
        if origin is None:
            raise TypeError(f"this handle was made by hand; use handle_of(session, UUID({str(self.id)!r})).result()")
        if not origin.engine.dialect.is_async:
            raise TypeError(
                "this job was enqueued by a sync session; ask with an async one: handle_of(session, handle.id).result()"
            )
        if origin.transaction is not None and origin.transaction.is_active:
            raise NotCommitted(self.id, self.name)
        return origin


def id_of(job: UUID | Handle[Any]) -> UUID:
    """The id of a job that is named by it, or by its handle.

    Raises: `TypeError` for anything else.
    """
    named = job.id if isinstance(job, Handle) else job
    if not isinstance(named, UUID):
        raise TypeError(f"a job is named by its id, a UUID, or by its handle, not by {named!r:.100}")
    return named


@overload
def handle_of(session: AsyncSession, job_id: UUID) -> Handle[Any]: ...
@overload
def handle_of(session: AsyncSession, job_id: UUID, job: Definition[Any, ..., R]) -> Handle[R]: ...
def handle_of(session: AsyncSession, job_id: UUID, job: Definition[Any, ..., Any] | None = None) -> Handle[Any]:
    """The handle of a job that is known by its id only, as in another process than the one that enqueued it.

    Nothing is asked of the database; of the session it remembers where to look, and who is told that somebody waits.

    Args:
        session: a session on the job's database.
        job_id: the job's id.
        job: its function, which gives the result its type; without one, its name decides if it is known here, and a
            result is plain JSON if it is not.

    Raises:
        SettingsError: no publisher is bound to the session and no Redis address is set.

    """
    origin = Origin(_engine_of(session.sync_session), destination_of(session.sync_session))
    return Handle(job_id, job.name if job else "", "created", origin, job.signature if job else None)


def _engine_of(session: Session) -> Engine:
    # An attempt's session would take its connection now.
    bind = session.bind if OUTBOX in session.info else session.get_bind(Job)
    assert bind is not None
    return bind.engine if isinstance(bind, Connection) else bind


def _result_of(stand: Stand, signature: Signature | None) -> Any:
    match stand.state:
        case JobState.CANCELLED:
            raise JobCancelled(stand.id, stand.name, stand.error or "")
        case JobState.FAILED:
            # The job's own error begins with its type; a worker that died, or a missing function, is none of its own.
            own = stand.ending is Ending.FAILED
            type_, _, message = (stand.error or "").partition(": ") if own else ("", "", stand.error or "")
            raise JobFailed(stand.id, stand.name, type_, message, stand.traceback or "")
        case _:
            text = "null" if stand.result is None else stand.result
            if signature is None and stand.name in default_registry:
                signature = default_registry.get(stand.name).signature
            return from_json(text) if signature is None else signature.decode_result(text)


def _now(stand: Stand | None) -> str:
    if stand is None:
        return "there is no such job: its transaction has not committed or was rolled back, or the job was pruned"
    if stand.state is JobState.RUNNING:
        return f"it is running, attempt {stand.attempt}, and goes on"
    if stand.error:
        return f"it waits to be tried again: its last attempt ended with {stand.error}"
    return "it is queued, and goes on waiting for a worker"


def _seconds(timeout: float | timedelta | None) -> float | None:
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if seconds is not None and not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"timeout must be 0 or more seconds, or None to wait for as long as it takes, not {timeout!r}")
    return seconds
