"""What many tests need: rows to start from, a worker's parts, a worker in this process, and waiting for a condition."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from arq.connections import ArqRedis
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.broker.connection import connect
from worker.broker.keys import PAYLOAD_PREFIX, lane_key
from worker.core.priority import DEFAULT_PRIORITY
from worker.core.registry import Registry
from worker.core.states import JobState
from worker.db.ids import uuid7
from worker.db.models import Attempt, Job
from worker.flow.work import Work
from worker.observe import events
from worker.observe.events import Event
from worker.process import Worker
from worker.resources import open_work
from worker.settings import Settings


async def until(condition: Callable[[], Awaitable[Any] | Any], what: str, limit: float = 30.0) -> Any:
    """Wait until the condition holds, and return what it gave; fail after `limit` seconds."""
    ends = time.monotonic() + limit
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < ends, f"waited {limit:g} s in vain: {what}"
        await asyncio.sleep(0.01)


async def a_job(engine: AsyncEngine, **columns: Any) -> UUID:
    """A row as the test wants it: queued and due unless it says otherwise."""
    job_id = columns.pop("id", None) or uuid7()
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "id": job_id,
        "name": "tests.noop",
        "queue": "default",
        "args": {},
        "state": JobState.QUEUED,
        "run_at": now - timedelta(seconds=1),
        **columns,
    }
    if values["state"] == JobState.RUNNING:
        values = {"token": uuid4(), "worker_id": uuid7(), "attempt": 1, "started_at": now, **values}
    async with engine.begin() as connection:
        await connection.execute(insert(Job).values(**values))
    return job_id


async def row(engine: AsyncEngine, job_id: UUID) -> Any:
    """The job's row, None when there is none."""
    async with engine.connect() as connection:
        return (await connection.execute(select(Job.__table__).where(Job.id == job_id))).first()


async def state(engine: AsyncEngine, job_id: UUID) -> str | None:
    """The job's state, None when it has no row."""
    found = await row(engine, job_id)
    return None if found is None else str(found.state)


@asynccontextmanager
async def a_locked_row(engine: AsyncEngine, job_id: UUID) -> AsyncIterator[None]:
    """Somebody's open transaction holds the job's row while the block lasts, as one that cancels it."""
    async with engine.begin() as connection:
        await connection.execute(select(Job.id).where(Job.id == job_id).with_for_update(key_share=True))
        yield


async def attempts(engine: AsyncEngine, job_id: UUID) -> list[Any]:
    """The attempts a job left, oldest first."""
    async with engine.connect() as connection:
        query = select(Attempt.__table__).where(Attempt.job_id == job_id).order_by(Attempt.number)
        return list((await connection.execute(query)).all())


async def hints(redis: ArqRedis, queue: str = "default", priority: int = DEFAULT_PRIORITY) -> dict[str, float]:
    """The ids in one lane of a queue of Redis, each with its score."""
    lane = lane_key(queue, priority)
    return {raw.decode(): score for raw, score in await redis.zrange(lane, 0, -1, withscores=True)}


async def payload_ids(redis: ArqRedis) -> set[str]:
    """The ids that have a payload in Redis."""
    prefix = PAYLOAD_PREFIX.encode()
    return {key.removeprefix(prefix).decode() for key in await redis.keys(prefix + b"*")}


@asynccontextmanager
async def a_work(settings: Settings, registry: Registry | None = None) -> AsyncIterator[Work]:
    """A worker's parts without the worker: its row exists, nothing beats and nothing is claimed by itself."""
    redis = connect(str(settings.redis.url), timeout=settings.redis.timeout)
    context: dict[str, Any] = {"redis": redis}
    try:
        async with open_work(settings, str(settings.database.url), redis, registry or Registry(), context) as work:
            context.update(engine=work.jobs_engine, sessions=work.sessions)
            yield work
    finally:
        await redis.aclose()


@asynccontextmanager
async def a_worker(settings: Settings, registry: Registry) -> AsyncIterator[Worker]:
    """A whole worker in this process and on this loop, stopped at the end of the block."""
    worker = Worker(settings, registry=registry, handle_signals=False)
    task = asyncio.create_task(worker.main())
    try:
        yield worker
    finally:
        worker.stop()
        try:
            await task
        finally:
            await worker.close()


async def run_all(settings: Settings, registry: Registry) -> None:
    """Run a worker in burst mode: returns when nothing is due and nothing runs."""
    worker = Worker(settings, registry=registry, burst=True, handle_signals=False)
    try:
        await worker.main()
    finally:
        await worker.close()


@asynccontextmanager
async def heard() -> AsyncIterator[list[Event]]:
    """The events emitted in this process while the block lasts, without those that every job has (level debug)."""
    told: list[Event] = []
    stop = events.listen(lambda event: told.append(event) if event.level > logging.DEBUG else None)
    try:
        yield told
    finally:
        stop()
