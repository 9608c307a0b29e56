"""Enqueue: write the job's row in the caller's own transaction; its hint goes out once that has committed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from worker.broker.hints import Hint
from worker.core.codec import encode_plain
from worker.core.errors import ArgumentsInvalid, AutocommitRefused
from worker.core.names import DEFAULT_QUEUE, LONGEST_NAME, RESERVED_QUEUES, is_name
from worker.core.registry import default_registry
from worker.core.retry import LONGEST_DELAY, as_delay, is_near
from worker.db.failures import schema_needed
from worker.db.ids import uuid7
from worker.db.models import Job
from worker.db.statements.enqueue import ENQUEUE
from worker.flow.after_commit import Destination, destination_of, publish_after_commit
from worker.flow.handle import Handle


@dataclass(frozen=True, slots=True)
class Call:
    """One enqueue to be: a job's name, its checked arguments as JSON, and when and where it shall run."""

    name: str
    args: str
    queue: str = DEFAULT_QUEUE
    delay: timedelta = timedelta(0)
    run_at: datetime | None = None


async def enqueue(
    session: AsyncSession,
    name: str,
    args: Mapping[str, Any] | None = None,
    *,
    queue: str | None = None,
    delay: float | timedelta = 0,
    run_at: datetime | None = None,
) -> Handle:
    """Enqueue by name, for a service that cannot import the job's code; otherwise as `fn.enqueue`.

    Args:
        session: the caller's session, in whose transaction the job is written.
        name: the definition's name; where it is registered in this process too, the arguments are checked here.
        args: the job's arguments by name, plain JSON.
        queue: the queue; without one, that of the definition if known here, else `default`.
        delay: seconds, or a timedelta, from the enqueue until the job is due.
        run_at: the moment it is due, with a time zone; instead of `delay`.

    Raises: as `Options.enqueue`.

    """
    (handle,) = await enqueue_many(session, [call_by_name(name, args or {}, queue=queue, delay=delay, run_at=run_at)])
    return handle


def call_by_name(
    name: str,
    args: Mapping[str, Any],
    *,
    queue: str | None = None,
    delay: float | timedelta = 0,
    run_at: datetime | None = None,
) -> Call:
    """The enqueue to be of a job known by its name only; raises what `enqueue` raises for its arguments."""
    known = default_registry.get(name) if name in default_registry else None
    if queue is None:
        queue = known.rules.queue if known else DEFAULT_QUEUE
    call = template(name, queue=queue, delay=delay, run_at=run_at)
    return replace(call, args=known.signature.bind_mapping(args) if known else encode_plain(args))


async def enqueue_many(session: AsyncSession, calls: Iterable[Call]) -> list[Handle]:
    """Enqueue all of these with one statement; the handles come in the same order.

    Args:
        session: the caller's session, in whose transaction the jobs are written.
        calls: made by `fn.call(…)` or `fn.options(…).call(…)`.

    Raises:
        AutocommitRefused: the session's connection is in AUTOCOMMIT.
        SettingsError: no publisher is bound to the session and no Redis address is set.

    """
    calls = list(calls)
    if not calls:
        return []
    destination = destination_of(session.sync_session)
    handles = [Handle(uuid7(), call.name) for call in calls]
    await session.run_sync(_insert, destination, handles, calls)
    return handles


def template(name: str, *, queue: str, delay: float | timedelta, run_at: datetime | None) -> Call:
    """An enqueue to be that has no arguments yet; raises `ArgumentsInvalid` for what cannot be."""
    try:
        wait = as_delay(delay)
    except (TypeError, ValueError) as error:
        raise ArgumentsInvalid(f"{name}: {error}; leave it out to run the job at once") from None
    if run_at is not None and wait:
        raise ArgumentsInvalid(f"{name}: give either delay or run_at, not both")
    if run_at is not None and run_at.utcoffset() is None:
        raise ArgumentsInvalid(f"{name}: run_at needs a time zone, for example datetime.now(UTC) + timedelta(hours=1)")
    if run_at is not None and not is_near(run_at, datetime.now(UTC)):
        raise ArgumentsInvalid(f"{name}: run_at must lie within {LONGEST_DELAY.days:,} days of now, not at {run_at}")
    for what, word in (("name", name), ("queue", queue)):
        if not is_name(word):
            raise ArgumentsInvalid(f"{name[:LONGEST_NAME]!a}: a {what} is 1 to {LONGEST_NAME} printable characters")
    if queue.startswith(RESERVED_QUEUES):
        raise ArgumentsInvalid(f"{name}: no queue's name begins with arq: or exarq:; ARQ's own is called 'default'")
    return Call(name, "{}", queue, wait, run_at)


def _insert(session: Session, destination: Destination, handles: Sequence[Handle], calls: Sequence[Call]) -> None:
    connection = session.connection(bind_arguments={"mapper": Job})
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise AutocommitRefused(
            "this session's connection is in AUTOCOMMIT, so no transaction carries the job; enqueue in a session whose"
            " engine has no isolation_level='AUTOCOMMIT'"
        )
    parameters = {
        "ids": [handle.id for handle in handles],
        "names": [call.name for call in calls],
        "queues": [call.queue for call in calls],
        "argss": [call.args for call in calls],
        "delays": [call.delay for call in calls],
        "ats": [call.run_at for call in calls],
    }
    with schema_needed():
        rows = connection.execute(ENQUEUE, parameters).all()
    of_id = {handle.id: call for handle, call in zip(handles, calls, strict=True)}
    hints = [
        Hint(id_, of_id[id_].name, of_id[id_].queue, due_in, int(enqueued_ms), installation)
        for id_, due_in, enqueued_ms, installation in rows
    ]
    publish_after_commit(session, connection, destination, hints)
