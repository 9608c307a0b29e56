"""`@job`: a function that stays callable as the function it was, and is enqueued with the same arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, Unpack, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from worker.core.context import JobContext
from worker.core.options import JobOptions
from worker.core.registry import Definition, define
from worker.core.signature import Signature
from worker.flow.call import Call, EnqueueOptions, template
from worker.flow.enqueue import enqueue_one
from worker.flow.handle import Handle
from worker.flow.in_session import SyncSession

P = ParamSpec("P")
R = TypeVar("R")
First = TypeVar("First", bound=AsyncSession | JobContext | Session)
Async = TypeVar("Async", bound=AsyncSession | JobContext)
Sync = TypeVar("Sync", bound=Session)


class Options(Generic[P, R]):
    """The options of one enqueue; made by `fn.options(…)`."""

    def __init__(self, signature: Signature, template: Call) -> None:
        self._signature = signature
        self._template = template

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call:
        """The enqueue to be, for `enqueue_many`; raises what `enqueue` raises for its arguments."""
        return self._template.of(self._signature, self._signature.bind(*args, **kwargs))

    @overload
    def enqueue(
        self, session: AsyncSession, /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, Handle[R]]: ...
    @overload
    def enqueue(self, session: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Handle[R]: ...
    def enqueue(self, session: AsyncSession | SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Write the job's row in the session's transaction: it will run if, and only if, that commits.

        Args:
            session: the caller's session, in whose transaction the job is written; with a sync one, nothing is
                awaited.
            args: the job's own arguments, checked against its annotations.
            kwargs: likewise, by name.

        Raises:
            ArgumentsInvalid: they do not fit the signature.
            NotStorable: they cannot be kept as JSON, or take more than 1 MiB of it.
            AlreadyEnqueued: another job has the key, and `on_conflict` is "raise", or "replace" and it has started.
            AutocommitRefused: the session's connection is in AUTOCOMMIT.

        """
        return enqueue_one(session, self.call(*args, **kwargs))


class JobFunction(Definition[First, P, R]):
    """A function that is a job: callable as the function it was, and enqueued with the same arguments."""

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call:
        """The enqueue to be, for `enqueue_many`; raises what `enqueue` raises for its arguments."""
        return self._as_defined.call(*args, **kwargs)

    @overload
    def enqueue(
        self, session: AsyncSession, /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, Handle[R]]: ...
    @overload
    def enqueue(self, session: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Handle[R]: ...
    def enqueue(self, session: AsyncSession | SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Write the job's row in the session's transaction: it will run if, and only if, that commits.

        Args, raises: as `Options.enqueue`.
        """
        return enqueue_one(session, self.call(*args, **kwargs))

    @functools.cached_property
    def _as_defined(self) -> Options[P, R]:
        return self.options()

    def options(self, **options: Unpack[EnqueueOptions]) -> Options[P, R]:
        """How one enqueue differs from the definition.

        Args:
            options: as in `EnqueueOptions`: `queue`, `delay` or `run_at`, `priority`, `expires`, and `key` with
                `unique` and `on_conflict`.

        Raises:
            ArgumentsInvalid: an option's value cannot be used, or not beside another; the message says what can.

        """
        return Options(self.signature, template(self.name, self.rules, options))


class SyncJobFunction(JobFunction[First, P, R]):
    """A `def` that is a job: called, it is the sync function it was."""

    def __init__(self, fn: Callable[Concatenate[First, P], R], **options: Unpack[JobOptions]) -> None:
        super().__init__(fn, **options)  # type: ignore[arg-type]  # whether it is awaited, its signature says

    # Not what an async job's call returns; who calls a job's function himself knows which of the two it is.
    def __call__(self, first: First, /, *args: P.args, **kwargs: P.kwargs) -> R:  # type: ignore[override]
        """Call the function itself, here and now."""
        return self.fn(first, *args, **kwargs)  # type: ignore[return-value]


class JobDecorator(Protocol):
    """What `@job(…)` with options returns."""

    @overload
    def __call__(self, fn: Callable[Concatenate[Async, P], Coroutine[Any, Any, R]], /) -> JobFunction[Async, P, R]: ...
    @overload
    def __call__(self, fn: Callable[Concatenate[Sync, P], R], /) -> SyncJobFunction[Sync, P, R]: ...
    def __call__(self, fn: Any, /) -> Any:
        """Make the function a job."""


@overload
def job(fn: Callable[Concatenate[Async, P], Coroutine[Any, Any, R]], /) -> JobFunction[Async, P, R]: ...
@overload
def job(fn: Callable[Concatenate[Sync, P], R], /) -> SyncJobFunction[Sync, P, R]: ...
@overload
def job(**options: Unpack[JobOptions]) -> JobDecorator: ...
def job(fn: Any = None, /, **options: Unpack[JobOptions]) -> Any:
    """Make a function a job: `@job`, or `@job(queue="billing", max_attempts=8, timeout=60)`.

    The first parameter of an `async def` is an `AsyncSession` or a `JobContext`, that of a `def` a `Session`; the rest
    are the job's arguments. A `def` runs unchanged on the worker's event loop: nothing else moves while it computes.

    Args:
        fn: the function.
        options:
            `name`: the name it is known by; without one, the last part of its module and its own name:
            `billing.charge`.
            `queue`: the queue its jobs wait in.
            `timeout`: seconds, or a timedelta, after which an attempt is cancelled; without one, `jobs.timeout`.
            `max_attempts`: after how many failures the job is failed; without one, `jobs.max_attempts`.
            `isolation`: "REPEATABLE READ" or "SERIALIZABLE" for the attempt's transaction; one that PostgreSQL could
            not serialize is tried again and counts as no failure.
            `read_only`: whether PostgreSQL refuses whatever the job would write.
            `commits`: "own" for progress that survives a crash: each commit of the session is a real one, at most
            once per attempt, and an attempt that runs again sees what the earlier ones committed.
            `priority`: from 0, which comes first, to 9; without one, 5. See `worker.core.priority.STEP`.
            `expires`: seconds, or a timedelta, after a job is first due; no attempt starts later than that.
            `lazy_loads`: after how many lazy loads of an attempt's sync code it is reported, 50; None: after none.

    Raises:
        DefinitionError: the function cannot be a job, or an option is not one; the message says how it must look.
        DuplicateJob: another function has that name.

    """
    if fn is None:
        return lambda function: _job(function, options)
    return _job(fn, options)


def _job(fn: Any, options: JobOptions) -> JobFunction[Any, ..., Any]:
    cls = JobFunction if inspect.iscoroutinefunction(fn) else SyncJobFunction
    return define(fn, cls, **options)
