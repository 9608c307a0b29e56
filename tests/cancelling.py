"""Jobs to cancel, who asks for it, and what is left of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.flow.helpers import note, registry_of
from tests.support import state
from worker.core.context import JobContext
from worker.core.registry import Registry
from worker.db import reads
from worker.flow.cancel import cancel
from worker.observe.events import StepFailed
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]


def beating_seldom(settings: Settings, *, concurrency: int = 2) -> Settings:
    """A worker that beats only long after a test has given up: what it learns, it learns by a message."""
    times = {"lease": timedelta(seconds=300), "beat": timedelta(seconds=100)}
    worker = settings.worker.model_copy(update={**times, "concurrency": concurrency})
    return settings.model_copy(update={"worker": worker})


def with_redis(settings: Settings, url: str) -> Settings:
    """The same worker with its Redis elsewhere."""
    return settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": url})})


def waiting(gate: asyncio.Event | None = None) -> Registry:
    """A job that writes and then waits, for a minute, or with `gated` for the gate."""

    async def job(ctx: JobContext, gated: bool = False) -> None:
        await note(ctx.session, f"{ctx.job_id} {ctx.attempt}")
        await (gate or asyncio.Event()).wait() if gated else await asyncio.sleep(60)

    return registry_of(job)


async def ask(sessions: Sessions, job: UUID) -> str:
    """Cancel the job in a transaction of its own; returns what came of it."""
    async with sessions.begin() as session:
        return (await cancel(session, job)).outcome


async def flag(engine: AsyncEngine, job: UUID) -> None:
    """What a request leaves whose message is lost."""
    await execute(engine, "UPDATE exarq.job SET cancel_requested = true WHERE id = :id", id=job)


async def want_again(engine: AsyncEngine, job: UUID) -> None:
    """What is left when a person wants the job after all."""
    await execute(engine, "UPDATE exarq.job SET state = 'queued', cancel_requested = false WHERE id = :id", id=job)


async def execute(engine: AsyncEngine, statement: str, **parameters: Any) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(statement), parameters)


async def scalar(engine: AsyncEngine, query: str, **parameters: Any) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(text(query), parameters)).scalar_one()


async def installation_of(engine: AsyncEngine) -> UUID:
    """Whose channel the workers on this database listen to."""
    async with engine.connect() as connection:
        return await reads.installation_id(connection)


async def running_statements(engine: AsyncEngine, word: str) -> int:
    """How many backends are busy with a statement that has this word."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
        " AND query LIKE :pattern AND pid <> pg_backend_pid()"
    )
    return int(await scalar(engine, query, pattern=f"%{word}%"))


async def waiting_statements(engine: AsyncEngine, word: str) -> int:
    """How many backends wait for somebody's lock in a statement that has this word."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        " AND query LIKE :pattern"
    )
    return int(await scalar(engine, query, pattern=f"%{word}%"))


async def idle_in_transaction(engine: AsyncEngine) -> int:
    """How many backends wait for their client in the middle of a transaction."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in trans%'"
    return int(await scalar(engine, query))


async def advisory_locks(engine: AsyncEngine, key: int) -> int:
    """How many hold this lock."""
    query = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = :key"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return int(await scalar(engine, query, key=key))


def failures(events: list[Any]) -> list[str]:
    """What the listening complained of."""
    return [event.error for event in events if isinstance(event, StepFailed) and event.step == "listen"]


async def holds(found: Awaitable[Any], wanted: Callable[[Any], bool]) -> bool:
    return bool(wanted(await found))


async def are(engine: AsyncEngine, wanted: str, *jobs: UUID) -> bool:
    """Whether all these jobs are in this state."""
    return {await state(engine, job) for job in jobs} == {wanted}
