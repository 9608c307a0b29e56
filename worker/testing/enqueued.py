"""What was enqueued, and assertions about it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from pydantic_core import from_json, to_jsonable_python
from sqlalchemy import Interval, Text, cast, select
from sqlalchemy.ext.asyncio import AsyncSession

from worker.client import Client
from worker.core.errors import ArgumentsInvalid, nearest
from worker.core.registry import Definition, default_registry
from worker.core.retry import as_delay
from worker.db.models import Job

# A delay is added to PostgreSQL's clock at the enqueue, which goes on while it does so.
_CLOCK_TOLERANCE: Final = timedelta(seconds=1)
_SHOWN: Final = 10

AnyJob = Definition[Any, ..., Any] | str


@dataclass(frozen=True, slots=True)
class Enqueued:
    """One job that was enqueued.

    Args:
        id: its id, as its `Handle` has it.
        name: the name of its definition.
        args: its arguments by name, as the function gets them; plain JSON where the definition is not known.
        queue: its queue.
        delay: how long after its enqueue it was first due.
        run_at: when it is due; a retry or a snooze changes that.
        state: "queued", "running", "succeeded", "failed" or "cancelled".

    """

    id: UUID
    name: str
    args: Mapping[str, Any]
    queue: str
    delay: timedelta
    run_at: datetime
    state: str

    def __str__(self) -> str:
        args = ", ".join(f"{name}={value!r}" for name, value in self.args.items())
        seconds = timedelta(seconds=round(self.delay.total_seconds()))
        delay = f", delay {seconds}" if seconds else ""
        return f"{self.name}({args})  queue {self.queue!r}{delay}, {self.state}"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a job must be to match; None, or an argument that is not named, is free."""

    name: str | None
    args: Mapping[str, Any]
    queue: str | None
    delay: timedelta | None
    run_at: datetime | None

    def differences(self, job: Enqueued) -> int:
        """How much of what is wanted the job is not."""
        misses = sum(name not in job.args or not _same(job.args[name], value) for name, value in self.args.items())
        misses += self.queue not in (None, job.queue)
        misses += self.delay is not None and abs(job.delay - self.delay) >= _CLOCK_TOLERANCE
        misses += self.run_at is not None and abs(job.run_at - self.run_at) >= _CLOCK_TOLERANCE
        return misses

    def likeness(self, job: Enqueued) -> tuple[float, int]:
        """A key that sorts the nearest first: by the name, then by what differs."""
        same = 1.0 if self.name is None else difflib.SequenceMatcher(None, self.name, job.name).ratio()
        return -same, self.differences(job)

    def matches(self, job: Enqueued) -> bool:
        return self.name in (None, job.name) and not self.differences(job)

    def __str__(self) -> str:
        parts = [f"{name}={value!r}" for name, value in self.args.items()]
        text = "any job" if self.name is None else f"{self.name}({', '.join(parts)})"
        options = {"queue": self.queue, "delay": self.delay, "run_at": self.run_at}
        said = [
            f"{name} {value if name == 'delay' else repr(value)}"
            for name, value in options.items()
            if value is not None
        ]
        return f"{text} with {', '.join(said)}" if said else text


async def enqueued(where: AsyncSession | Client, job: AnyJob | None = None) -> list[Enqueued]:
    """The jobs that were enqueued, in that order and whatever became of them since; not those of `run_inline`.

    Args:
        where: the session whose transaction they are in, or a client for those that are committed.
        job: only those of this function decorated with `@job`, or of this name.

    """
    if isinstance(where, Client):
        async with where.sessions() as session:
            return await enqueued(session, job)
    delay = (Job.first_due_at - Job.enqueued_at).cast(Interval)
    query = select(Job.id, Job.name, cast(Job.args, Text), Job.queue, delay, Job.run_at, Job.state)
    if job is not None:
        query = query.where(Job.name == _name(job))
    rows = await where.execute(query.order_by(Job.enqueued_at, Job.id))
    return [
        Enqueued(id_, name, _arguments(_definition(name, job), args), queue, delay, run_at, state)
        for id_, name, args, queue, delay, run_at, state in rows
    ]


async def assert_enqueued(
    where: AsyncSession | Client,
    job: AnyJob,
    /,
    *,
    args: Mapping[str, Any] | None = None,
    queue: str | None = None,
    delay: float | timedelta | None = None,
    run_at: datetime | None = None,
    count: int | None = None,
    **arguments: Any,
) -> list[Enqueued]:
    """Fail the test unless such a job was enqueued, whatever became of it since; returns those that match.

    Args:
        where: the session whose transaction it is in, or a client for what is committed.
        job: the function decorated with `@job`, or a job's name.
        args: arguments by name; for one that is called as an option here.
        queue: its queue.
        delay: how long after its enqueue it was first due, in seconds or as a timedelta; to a second.
        run_at: when it is due, with a time zone; to a second.
        count: how many there are; without it, at least one.
        arguments: the job's own arguments by name; those that are not named may be anything.

    Raises:
        AssertionError: there is none, or another number; the message has those that there are, the nearest first.
        ArgumentsInvalid: the job has no argument of that name.

    """
    __tracebackhide__ = True
    wanted = _wanted(job, {**(args or {}), **arguments}, queue, delay, run_at)
    jobs = await enqueued(where)
    found = [one for one in jobs if wanted.matches(one)]
    if not found if count is None else len(found) != count:
        number = "no job" if count is None else f"{len(found)} instead of {count}"
        raise AssertionError(f"{number} {wanted} was enqueued; {_nearest_of(jobs, wanted)}")
    return found


async def assert_not_enqueued(
    where: AsyncSession | Client,
    job: AnyJob | None = None,
    /,
    *,
    args: Mapping[str, Any] | None = None,
    queue: str | None = None,
    **arguments: Any,
) -> None:
    """Fail the test if such a job was enqueued, whatever became of it since; without a job, if any was.

    Args, raises: as `assert_enqueued`.
    """
    __tracebackhide__ = True
    wanted = _wanted(job, {**(args or {}), **arguments}, queue, None, None)
    found = [one for one in await enqueued(where) if wanted.matches(one)]
    if found:
        raise AssertionError(f"{wanted} was enqueued:{_listed(found)}")


def _wanted(
    job: AnyJob | None,
    args: Mapping[str, Any],
    queue: str | None,
    delay: float | timedelta | None,
    run_at: datetime | None,
) -> _Wanted:
    name = None if job is None else _name(job)
    if name is not None and (definition := _definition(name, job)) is not None:
        known = definition.signature.names
        if unknown := [given for given in args if given not in known]:
            raise ArgumentsInvalid(f"{name}: unknown argument {unknown[0]!r}{nearest(unknown[0], known)}")
    return _Wanted(name, args, queue, None if delay is None else as_delay(delay), run_at)


def _name(job: AnyJob) -> str:
    return job if isinstance(job, str) else job.name


def _definition(name: str, job: AnyJob | None) -> Definition[Any, ..., Any] | None:
    if isinstance(job, Definition) and job.name == name:
        return job
    return default_registry.get(name) if name in default_registry else None


def _arguments(definition: Definition[Any, ..., Any] | None, text: str) -> Mapping[str, Any]:
    """The arguments as the function gets them, defaults included."""
    plain: dict[str, Any] = from_json(text)
    if definition is None:
        return plain
    try:
        given = definition.signature.call_arguments(text)
    except ArgumentsInvalid:  # enqueued by name, without the code
        return plain
    parameters = inspect.signature(definition.fn).parameters
    defaults = {name: parameters[name].default for name in definition.signature.names}
    return {name: given.get(name, default) for name, default in defaults.items()}


def _same(one: object, other: object) -> bool:
    return one == other or to_jsonable_python(one, fallback=repr) == to_jsonable_python(other, fallback=repr)


def _nearest_of(jobs: Sequence[Enqueued], wanted: _Wanted) -> str:
    if not jobs:
        return "nothing was; is this the session, or the database, that the code under test enqueues in?"
    return f"the nearest of {len(jobs)}:{_listed(sorted(jobs, key=wanted.likeness))}"


def _listed(jobs: Sequence[Enqueued]) -> str:
    more = [f"… and {len(jobs) - _SHOWN} more"] if len(jobs) > _SHOWN else []
    return "".join(f"\n  {line}" for line in [*jobs[:_SHOWN], *more])
