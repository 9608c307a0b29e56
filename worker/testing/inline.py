"""Run one job now and have what it returns, or raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ParamSpec, TypeVar, overload
from uuid import UUID

from sqlalchemy import Text, cast, delete, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from worker.core.registry import Registry
from worker.db import transitions
from worker.db.ids import uuid7
from worker.db.models import Attempt, Job
from worker.db.send import once
from worker.flow.holdings import Run
from worker.flow.job import JobFunction
from worker.flow.work import Work
from worker.testing.work import attempt, open_work, raise_failure

P = ParamSpec("P")
R = TypeVar("R")


@overload
async def run_inline(fn: JobFunction[Any, P, R], session: AsyncSession, /, *args: P.args, **kwargs: P.kwargs) -> R: ...
@overload
async def run_inline(
    fn: JobFunction[Any, ..., R], session: AsyncSession, /, *args: Any, context: Mapping[str, Any], **kwargs: Any
) -> R: ...
async def run_inline(
    fn: JobFunction[Any, ..., R],
    session: AsyncSession,
    /,
    *args: Any,
    context: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> R:
    """Run a job once, here and now, as a worker would, inside the session's transaction; returns its result.

    Its arguments and its result go through JSON, so what a worker could not store fails here, too. Its session is not
    the test's; what it wrote is rolled back if it raises, and what the test's session has loaded is read anew.

    Args:
        fn: a function decorated with `@job`.
        session: the test's session.
        args: the job's own arguments, without the session or context that it takes first.
        context: what `ctx[…]` gives the job.
        kwargs: the job's own arguments, by name.

    Raises: what the job raises, `Retry`, `Snooze`, `Cancel` and `Fail` included, and what `fn.enqueue` raises.

    """
    __tracebackhide__ = True
    registry = Registry()
    registry.register(fn)
    async with open_work(session, registry, context or {}) as work:
        async with work.sessions.begin() as own:
            job_id = (await fn.enqueue(own, *args, **kwargs)).id
        try:
            ended = await attempt(work, await _claim(work, job_id))
            if ended.error is not None:
                raise_failure(ended)
            query = select(cast(Job.result, Text)).where(Job.id == job_id)
            stored = await once(work.processor, lambda connection: connection.scalar(query))
            result: R = fn.signature.decode_result(stored or "null")
            return result
        finally:
            await once(work.processor, lambda connection: _forget(connection, job_id))


async def _claim(work: Work, job_id: UUID) -> Run:
    token = uuid7()
    claimed = await once(
        work.processor,
        lambda connection: transitions.claim(
            connection, [job_id], token=token, worker_id=work.identity.id, may_take_suspect=True
        ),
    )
    (run,) = work.holdings.claimed(token, claimed)
    return run


async def _forget(connection: AsyncConnection, job_id: UUID) -> None:
    """Delete the job: nobody enqueued it."""
    await connection.execute(delete(Attempt).where(Attempt.job_id == job_id))
    await connection.execute(delete(Job).where(Job.id == job_id))
