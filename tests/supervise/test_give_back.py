"""What ran in a dead process is given back once, whoever else is at it."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.support import a_job, a_locked_row, attempts, heard, row, state, until
from worker.broker.keys import lane_key
from worker.db import workers
from worker.db.ids import uuid7
from worker.observe.events import ProcessRescued
from worker.settings import Settings
from worker.supervise.give_back import give_back


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Whatever holds a job, it is waited for long enough on a loaded machine, too."""
    times = {"lease": timedelta(seconds=60), "beat": timedelta(seconds=2)}
    return settings.model_copy(update={"worker": settings.worker.model_copy(update=times)})


@pytest.fixture
async def dead(engine: AsyncEngine) -> UUID:
    """A worker that is registered and will never beat again."""
    worker = uuid7()
    async with engine.begin() as connection:
        await workers.register(connection, worker, queues=["default"], concurrency=1)
    return worker


async def test_the_jobs_wait_again_with_hints_and_the_crash_is_blamed_on_them(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, dead: UUID
) -> None:
    job = await a_job(engine, state="running", worker_id=dead, priority=2)
    elsewhere = await a_job(engine, state="running", worker_id=uuid7())

    async with heard() as events:
        await give_back(settings, 7, [dead], "SIGKILL")

    found = await row(engine, job)
    assert (found.state, found.crashes) == ("queued", 1)
    assert [one.error for one in await attempts(engine, job)] == [
        "its process (pid 7) died with SIGKILL while the job ran there"
    ]
    assert await redis.zrange(lane_key("default", 2), 0, -1) == [str(job).encode()]
    assert [(event.jobs, event.blamed) for event in events if isinstance(event, ProcessRescued)] == [(1, 1)]
    assert (await row(engine, elsewhere)).state == "running"
    await _cancel(engine, elsewhere)


async def test_two_rescues_at_the_same_moment_blame_once(engine: AsyncEngine, settings: Settings, dead: UUID) -> None:
    job = await a_job(engine, state="running", worker_id=dead)

    async with heard() as events:
        await asyncio.gather(*(give_back(settings, 7, [dead], "SIGKILL") for _ in range(3)))

    assert (await row(engine, job)).crashes == 1
    assert sum(event.jobs for event in events if isinstance(event, ProcessRescued)) == 1


async def test_what_another_transaction_holds_is_given_back_when_that_ends(
    engine: AsyncEngine, settings: Settings, dead: UUID
) -> None:
    held, free = [await a_job(engine, state="running", worker_id=dead) for _ in range(2)]

    async with a_locked_row(engine, held):
        giving = asyncio.create_task(give_back(settings, 7, [dead], "SIGKILL"))
        await until(lambda: _is_queued(engine, free), "the free one is given back")
        assert not giving.done()
    await giving

    assert (await row(engine, held)).state == "queued"


async def test_a_beat_that_was_still_on_its_way_does_not_keep_the_jobs(
    engine: AsyncEngine, settings: Settings, dead: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await a_job(engine, state="running", worker_id=dead)
    real, asked = workers.still_silent, []

    async def still_silent(*args: object) -> tuple[bool, bool]:
        asked.append(args)
        if len(asked) == 1:
            async with engine.begin() as other:
                await workers.beat(other, dead)
        return await real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "still_silent", still_silent)
    await give_back(settings, 7, [dead], "SIGKILL")

    assert (await row(engine, job)).state == "queued"
    assert len(asked) == 2


async def _is_queued(engine: AsyncEngine, job: UUID) -> bool:
    return await state(engine, job) == "queued"


async def _cancel(engine: AsyncEngine, job: UUID) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET state = 'cancelled' WHERE id = :id"), {"id": job})
