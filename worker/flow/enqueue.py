"""Enqueue: write the job's row in the caller's own transaction; its hint goes out once that has committed."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, Unpack, overload
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from worker.broker.hints import Hint, due_at
from worker.core.codec import encode_plain
from worker.core.errors import AutocommitRefused
from worker.core.options import Rules
from worker.core.priority import DEFAULT_PRIORITY
from worker.core.registry import default_registry
from worker.db.failures import schema_needed
from worker.db.ids import uuid7s
from worker.db.models import Job
from worker.db.statements.enqueue import BETWEEN, ENQUEUE, ENQUEUE_ALIKE
from worker.flow import unique
from worker.flow.after_commit import destination_of, publish_after_commit
from worker.flow.call import Call, EnqueueOptions, template
from worker.flow.handle import Handle, Origin
from worker.flow.in_session import SyncSession, in_session

__all__ = ["Call", "call_by_name", "enqueue", "enqueue_many"]


@overload
def enqueue(
    session: AsyncSession,
    name: str,
    args: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    **options: Unpack[EnqueueOptions],
) -> Coroutine[Any, Any, Handle[Any]]: ...
@overload
def enqueue(
    session: SyncSession,
    name: str,
    args: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    **options: Unpack[EnqueueOptions],
) -> Handle[Any]: ...
def enqueue(
    session: AsyncSession | SyncSession,
    name: str,
    args: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    **options: Unpack[EnqueueOptions],
) -> Any:
    """Enqueue by name, for a service that cannot import the job's code; otherwise as `fn.enqueue`.

    Args:
        session: the caller's session, in whose transaction the job is written; with a sync one, nothing is awaited.
        name: the definition's name; where it is registered in this process too, the arguments are checked here.
        args: the job's arguments by name, plain JSON.
        strict: refuse a name that is not registered in this process; else it may be one that newer workers know.
        options: as in `EnqueueOptions`; without them as the definition says if it is known here, else in the queue
            `default`, at once.

    Raises:
        UnknownJob: the name is not registered here, and `strict` is True; others as `Options.enqueue`.

    """
    return enqueue_one(session, call_by_name(name, args or {}, strict=strict, **options))


def enqueue_one(session: AsyncSession | SyncSession, call: Call) -> Any:
    """The handle of what this call enqueues; a coroutine of it where the session is async."""
    return in_session(session, lambda sync: _enqueue(sync, [call])[0])


def call_by_name(
    name: str, args: Mapping[str, Any], *, strict: bool = False, **options: Unpack[EnqueueOptions]
) -> Call:
    """The enqueue to be of a job known by its name only; raises what `enqueue` raises for its arguments."""
    known = default_registry.get(name) if strict or name in default_registry else None
    call = template(name, known.rules if known else Rules(), options)
    if known is None:
        return call._replace(args=encode_plain(args))
    return call.of(known.signature, known.signature.bind_mapping(args))


@overload
def enqueue_many(session: AsyncSession, calls: Iterable[Call]) -> Coroutine[Any, Any, list[Handle[Any]]]: ...
@overload
def enqueue_many(session: SyncSession, calls: Iterable[Call]) -> list[Handle[Any]]: ...
def enqueue_many(session: AsyncSession | SyncSession, calls: Iterable[Call]) -> Any:
    """Enqueue all of these with one statement, a few where keys are taken; the handles come in the same order.

    Args:
        session: the caller's session, in whose transaction the jobs are written; with a sync one, nothing is awaited.
        calls: made by `fn.call(…)` or `fn.options(…).call(…)`.

    Raises:
        AlreadyEnqueued: a key is taken and its call may not go without; then none of these is written.
        AutocommitRefused: the session's connection is in AUTOCOMMIT.
        SettingsError: no publisher is bound to the session and no Redis address is set.
        TypeError: one of them is no call, or the session is none.

    """
    made = list(calls)
    for call in made:
        if not isinstance(call, Call):
            raise TypeError(f"enqueue_many takes calls, made by fn.call(…), not {call!r:.100}")
    return in_session(session, _enqueue, made)


def _enqueue(session: Session, calls: Sequence[Call]) -> list[Handle]:
    if not calls:
        return []
    destination = destination_of(session)
    connection = session.connection(bind_arguments={"mapper": Job})
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise AutocommitRefused(
            "this session's connection is in AUTOCOMMIT, so no transaction carries the job; enqueue in a session whose"
            " engine has no isolation_level='AUTOCOMMIT'"
        )
    insert = _insert_plain if all(call.plain for call in calls) else unique.insert
    origin = Origin.of(connection, destination)
    with schema_needed():
        handles, hints = insert(connection, calls, origin)
    publish_after_commit(session, connection, destination, hints)
    return handles


def _insert_plain(
    connection: Connection, calls: Sequence[Call], origin: Origin
) -> tuple[list[Handle[Any]], list[Hint]]:
    ids = uuid7s(len(calls))
    insert = _insert_alike if all(_are_alike(call, calls[0]) for call in calls) else _insert_each
    hints = insert(connection, ids, calls)
    called = zip(ids, calls, strict=True)
    return [Handle(id_, call.name, "created", origin, call.signature) for id_, call in called], hints


def _insert_alike(connection: Connection, ids: Sequence[UUID], calls: Sequence[Call]) -> list[Hint]:
    name, queue = calls[0].name, calls[0].queue
    parameters = {
        "ids": BETWEEN.join(map(str, ids)),
        "argss": BETWEEN.join([call.args for call in calls]),
        "all_name": name,
        "all_queue": queue,
        "all_delay": calls[0].delay,
        "all_at": calls[0].run_at,
    }
    due_in, enqueued_ms, installation = connection.execute(ENQUEUE_ALIKE, parameters).one()
    due, enqueued_ms = due_at(due_in), int(enqueued_ms)
    return [Hint(id_, name, queue, due, enqueued_ms, installation, DEFAULT_PRIORITY) for id_ in ids]


def _insert_each(connection: Connection, ids: Sequence[UUID], calls: Sequence[Call]) -> list[Hint]:
    of_id = dict(zip(ids, calls, strict=True))
    parameters = {
        "ids": ids,
        "names": [call.name for call in calls],
        "queues": [call.queue for call in calls],
        "argss": [call.args for call in calls],
        "delays": [call.delay for call in calls],
        "ats": [call.run_at for call in calls],
    }
    rows = connection.execute(ENQUEUE, parameters).all()
    return [
        Hint(id_, of_id[id_].name, of_id[id_].queue, due_at(due_in), int(enqueued_ms), installation, DEFAULT_PRIORITY)
        for id_, due_in, enqueued_ms, installation in rows
    ]


def _are_alike(one: Call, other: Call) -> bool:
    """Whether they differ in nothing but their arguments."""
    return (
        one.name == other.name and one.queue == other.queue and one.delay == other.delay and one.run_at == other.run_at
    )
