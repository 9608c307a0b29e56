"""A job run by the flow's own functions, without the pump around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.support import a_job, a_work
from worker.core.registry import Registry
from worker.db import transitions
from worker.db.ids import uuid7
from worker.db.send import once
from worker.flow.holdings import Run
from worker.flow.job import JobFunction
from worker.flow.run import run as run_attempt
from worker.flow.work import Work
from worker.settings import Settings

NAME = "tests.job"


def registry_of(fn: Any, **options: Any) -> Registry:
    """A registry in which the function is the job `tests.job`."""
    registry = Registry()
    registry.register(JobFunction(fn, name=NAME, **options))
    return registry


@asynccontextmanager
async def a_work_with(settings: Settings, fn: Any, **options: Any) -> AsyncIterator[Work]:
    """A worker's parts that know one job, `tests.job`."""
    async with a_work(settings, registry_of(fn, **options)) as work:
        yield work


async def claimed(work: Work, *ids: UUID) -> list[Run]:
    """These jobs, claimed by this worker."""
    token = uuid7()
    work.holdings.claiming(token)
    jobs = await once(
        work.processor,
        lambda connection: transitions.claim(
            connection, ids, token=token, worker_id=work.identity.id, may_take_suspect=True
        ),
    )
    return work.holdings.claimed(token, jobs)


def start(work: Work, run: Run) -> asyncio.Task[None]:
    """Start the attempt, as the pump does."""
    run.task = asyncio.create_task(run_attempt(work, run))
    return run.task


async def run_job(work: Work, job_id: UUID) -> Run:
    """Claim and run this job to its end, stored."""
    (run,) = await claimed(work, job_id)
    await start(work, run)
    await work.flusher.drain()
    return run


async def run_new(work: Work, engine: AsyncEngine, **columns: Any) -> tuple[UUID, Run]:
    """A new job of `tests.job`, run to its end."""
    job_id = await a_job(engine, name=NAME, **columns)
    return job_id, await run_job(work, job_id)


async def note(session: AsyncSession, word: str) -> None:
    """Write something that a job is for."""
    await session.execute(text("INSERT INTO note VALUES (:word)"), {"word": word})


async def notes(engine: AsyncEngine) -> list[str]:
    """What jobs wrote and committed."""
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT word FROM note ORDER BY word"))).scalars())


async def end_backend(engine: AsyncEngine, pid: int | None) -> None:
    """Have the server end a connection, and wait until it has."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
