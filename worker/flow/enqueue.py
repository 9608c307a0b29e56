"""Enqueue: write the job's row in the caller's own transaction; its hint goes out once that has committed."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    DateTime,
    Float,
    Interval,
    Text,
    Uuid,
    bindparam,
    cast,
    column,
    func,
    insert,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from worker.broker.hints import Hint
from worker.broker.keys import DEFAULT_QUEUE
from worker.core.codec import encode_plain
from worker.core.context import JobContext
from worker.core.errors import ArgumentsInvalid, AutocommitRefused
from worker.core.names import LONGEST_NAME, RESERVED_QUEUES, is_name
from worker.core.registry import Definition, default_registry, define
from worker.core.retry import LONGEST_DELAY, as_delay, is_near
from worker.db.failures import schema_needed
from worker.db.ids import uuid7
from worker.db.models import Installation, Job
from worker.flow.after_commit import Destination, destination_of, publish_after_commit

P = ParamSpec("P")
R = TypeVar("R")
First = TypeVar("First", bound=AsyncSession | JobContext)


@dataclass(frozen=True, slots=True)
class Handle:
    """A job that was enqueued; it exists once the transaction commits.

    Args:
        id: the job's id, which `exarq jobs show` takes.
        name: the name of its definition.

    """

    id: UUID
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """One enqueue to be: a job's name, its checked arguments as JSON, and when and where it shall run."""

    name: str
    args: str
    queue: str = DEFAULT_QUEUE
    delay: timedelta = timedelta(0)
    run_at: datetime | None = None


class Options(Generic[P]):
    """The options of one enqueue; made by `fn.options(…)`."""

    def __init__(self, bind: Callable[P, str], template: Call) -> None:
        self._bind = bind
        self._template = template

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call:
        """The enqueue to be, for `enqueue_many`; raises what `enqueue` raises for its arguments."""
        return replace(self._template, args=self._bind(*args, **kwargs))

    async def enqueue(self, session: AsyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Handle:
        """Write the job's row in the session's transaction: it will run if, and only if, that commits.

        Args:
            session: the caller's session, in whose transaction the job is written.
            args: the job's own arguments, checked against its annotations.
            kwargs: likewise, by name.

        Raises:
            ArgumentsInvalid: they do not fit the signature.
            NotStorable: they cannot be kept as JSON, or take more than 1 MiB of it.
            AutocommitRefused: the session's connection is in AUTOCOMMIT.

        """
        (handle,) = await enqueue_many(session, [self.call(*args, **kwargs)])
        return handle


class JobFunction(Definition[First, P, R]):
    """A function that is a job: callable as the function it was, and enqueued with the same arguments."""

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call:
        """The enqueue to be, for `enqueue_many`; raises what `enqueue` raises for its arguments."""
        return self.options().call(*args, **kwargs)

    async def enqueue(self, session: AsyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Handle:
        """Write the job's row in the session's transaction: it will run if, and only if, that commits.

        Args, raises: as `Options.enqueue`.
        """
        return await self.options().enqueue(session, *args, **kwargs)

    def options(
        self,
        *,
        delay: float | timedelta = 0,
        run_at: datetime | None = None,
        queue: str | None = None,
    ) -> Options[P]:
        """How one enqueue differs from the definition.

        Args:
            delay: seconds, or a timedelta, from the enqueue until the job is due.
            run_at: the moment it is due, with a time zone; instead of `delay`.
            queue: another queue than the definition's.

        Raises:
            ArgumentsInvalid: `run_at` has no time zone, is more than 36,500 days away or stands beside a delay, the
                delay is negative or as long, or the queue's name cannot be one.

        """
        template = _template(self.name, queue=self.queue if queue is None else queue, delay=delay, run_at=run_at)
        return Options(self.signature.bind, template)


class JobDecorator(Protocol):
    """What `@job(…)` with options returns."""

    def __call__(self, fn: Callable[Concatenate[First, P], Coroutine[Any, Any, R]], /) -> JobFunction[First, P, R]:
        """Make the function a job."""


@overload
def job(fn: Callable[Concatenate[First, P], Coroutine[Any, Any, R]], /) -> JobFunction[First, P, R]: ...
@overload
def job(
    *,
    name: str | None = None,
    queue: str = DEFAULT_QUEUE,
    timeout: float | timedelta | None = None,
    max_attempts: int | None = None,
) -> JobDecorator: ...
def job(fn: Any = None, /, **options: Any) -> Any:  # noqa: D417 — the options are those of the overload
    """Make an async function a job: `@job`, or `@job(queue="billing", max_attempts=8, timeout=60)`.

    Its first parameter is an `AsyncSession` or a `JobContext`; the rest are the job's arguments.

    Args:
        fn: the function.
        name: the name it is known by; without one, the last part of its module and its own name: `billing.charge`.
        queue: the queue its jobs wait in.
        timeout: seconds, or a timedelta, after which an attempt is cancelled; without one, `jobs.timeout`.
        max_attempts: after how many failures the job is failed; without one, `jobs.max_attempts`.

    Raises:
        DefinitionError: the function cannot be a job; the message says how it must look.
        DuplicateJob: another function has that name.

    """
    if fn is None:
        return lambda function: define(function, JobFunction, **options)
    return define(fn, JobFunction, **options)


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
        queue = known.queue if known else DEFAULT_QUEUE
    template = _template(name, queue=queue, delay=delay, run_at=run_at)
    return replace(template, args=known.signature.bind_mapping(args) if known else encode_plain(args))


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


def _template(name: str, *, queue: str, delay: float | timedelta, run_at: datetime | None) -> Call:
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


def _insert_statement() -> Any:
    columns: dict[str, Any] = {
        "id": Uuid,
        "name": Text,
        "queue": Text,
        "args": Text,
        "delay": Interval,
        "at": DateTime(timezone=True),
    }
    given = (
        func.unnest(*(bindparam(f"{name}s", type_=ARRAY(type_)) for name, type_ in columns.items()))
        .table_valued(*(column(name, type_) for name, type_ in columns.items()), name="given")
        .render_derived()
    )
    # Not now(): that is the start of the transaction, and a follow-up's delay counts from here.
    now = func.clock_timestamp()
    due = func.coalesce(given.c.at, now + given.c.delay)
    rows = select(given.c.id, given.c.name, given.c.queue, cast(given.c.args, JSONB), now, due, due)
    table = Job.__table__
    return (
        insert(Job.__table__)  # type: ignore[arg-type]  # the table, so that no unit of work is paid for
        .from_select(
            ["id", "name", "queue", "args", "enqueued_at", "first_due_at", "run_at"], rows, include_defaults=False
        )
        .returning(
            table.c.id,
            cast(func.extract("epoch", table.c.run_at - now), Float),
            cast(func.extract("epoch", table.c.enqueued_at) * 1000, Float),
            select(Installation.id).scalar_subquery(),
        )
    )


_INSERT = _insert_statement()


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
        rows = connection.execute(_INSERT, parameters).all()
    of_id = {handle.id: call for handle, call in zip(handles, calls, strict=True)}
    hints = [
        Hint(id_, of_id[id_].name, of_id[id_].queue, due_in, int(enqueued_ms), installation)
        for id_, due_in, enqueued_ms, installation in rows
    ]
    publish_after_commit(session, connection, destination, hints)
