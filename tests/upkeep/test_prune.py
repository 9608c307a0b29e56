"""Old finished jobs are deleted in batches, with their attempts; everything else stays."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.life.jobs_for_tests import states
from tests.support import a_job, a_work, attempts, heard, state
from worker.db.ids import uuid7
from worker.db.models import Attempt, Job
from worker.observe.events import Pruned
from worker.settings import Settings
from worker.upkeep.prune import prune

DAY = timedelta(days=1)


@pytest.mark.parametrize(("ending", "kept"), [("succeeded", 7), ("cancelled", 7), ("failed", 30)])
async def test_a_finished_job_goes_when_it_is_old_enough(
    ending: str, kept: int, engine: AsyncEngine, settings: Settings
) -> None:
    young = await a_job(engine, state=ending, finished_at=_ago(kept * DAY - timedelta(minutes=1)))
    old = await a_job(engine, state=ending, finished_at=_ago(kept * DAY + timedelta(minutes=1)))
    async with engine.begin() as connection:
        for job in (young, old):
            await connection.execute(insert(Attempt).values(job_id=job, token=uuid4(), number=1, ending="retried"))

    async with a_work(settings) as work, heard() as events:
        assert await prune(work) is None

    assert await state(engine, young) == ending
    assert len(await attempts(engine, young)) == 1
    assert await state(engine, old) is None
    assert await attempts(engine, old) == []
    assert [event.jobs for event in events if isinstance(event, Pruned)] == [1]


async def test_a_job_that_is_not_final_stays_however_old(engine: AsyncEngine, settings: Settings) -> None:
    waiting = await a_job(engine, run_at=_ago(400 * DAY), finished_at=_ago(400 * DAY))

    async with a_work(settings) as work:
        await prune(work)

    assert await state(engine, waiting) == "queued"


async def test_more_than_a_batch_goes_at_once_again_and_then_rests(engine: AsyncEngine, settings: Settings) -> None:
    await _old_jobs(engine, 2_100)

    async with a_work(settings) as work:
        said = [await prune(work) for _ in range(3)]
        left = await states(engine)
        await _old_jobs(engine, 5)
        await prune(work)  # rests

    assert said == [timedelta(0), timedelta(0), None]
    assert left == {}
    assert await states(engine) == {"succeeded": 5}


async def test_two_workers_do_not_prune_at_the_same_time(engine: AsyncEngine, settings: Settings) -> None:
    await _old_jobs(engine, 100)

    async with a_work(settings) as one, a_work(settings) as two, heard() as events:
        await asyncio.gather(prune(one), prune(two))

    assert [event.jobs for event in events if isinstance(event, Pruned)] == [100]


async def test_a_row_that_somebody_has_locked_holds_up_nothing(engine: AsyncEngine, settings: Settings) -> None:
    locked = await a_job(engine, state="succeeded", finished_at=_ago(8 * DAY))
    free = await a_job(engine, state="succeeded", finished_at=_ago(8 * DAY))

    async with engine.begin() as connection:
        await connection.execute(text("SELECT 1 FROM exarq.job WHERE id = :id FOR UPDATE"), {"id": locked})
        async with a_work(settings) as work:
            await prune(work)

    assert await state(engine, locked) == "succeeded"
    assert await state(engine, free) is None


def _ago(age: timedelta) -> datetime:
    return datetime.now(UTC) - age


async def _old_jobs(engine: AsyncEngine, count: int) -> None:
    rows: list[dict[str, Any]] = [
        {"id": uuid7(), "name": "n", "queue": "q", "args": {}, "state": "succeeded", "finished_at": _ago(8 * DAY)}
        for _ in range(count)
    ]
    async with engine.begin() as connection:
        await connection.execute(insert(Job), rows)
