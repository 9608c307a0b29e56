"""Final → gone: by state and age, in batches, with the attempts, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.db.moves import send
from tests.support import a_job, attempts, row
from worker.core.states import FINAL, JobState
from worker.db import transitions
from worker.db.models import Attempt

WEEK = timedelta(days=7)


async def prune(engine: AsyncEngine, state: JobState, *, batch: int = 100) -> Any:
    return await send(engine, lambda c: transitions.prune(c, state, keep=WEEK, batch=batch))


async def finished(engine: AsyncEngine, state: JobState, ago: timedelta) -> UUID:
    return await a_job(engine, state=state, finished_at=datetime.now(UTC) - ago)


@pytest.mark.parametrize("state", sorted(FINAL))
async def test_old_jobs_of_a_state_go_with_their_attempts(engine: AsyncEngine, state: JobState) -> None:
    old, young = await finished(engine, state, WEEK * 2), await finished(engine, state, WEEK / 2)
    others = [await finished(engine, other, WEEK * 2) for other in FINAL - {state}]
    async with engine.begin() as connection:
        for job_id in (old, young):
            await connection.execute(insert(Attempt).values(job_id=job_id, token=uuid4(), number=1, ending="retried"))

    pruned = await prune(engine, state)

    assert pruned == 1
    assert await row(engine, old) is None
    assert await attempts(engine, old) == []
    assert len(await attempts(engine, young)) == 1
    assert None not in [await row(engine, job_id) for job_id in (young, *others)]


async def test_the_oldest_go_first_and_no_more_than_a_batch(engine: AsyncEngine) -> None:
    by_age = [await finished(engine, JobState.FAILED, WEEK * weeks) for weeks in (2, 5, 3, 4)]

    first = await prune(engine, JobState.FAILED, batch=3)
    left = [await row(engine, job_id) is not None for job_id in by_age]
    second = await prune(engine, JobState.FAILED, batch=3)

    assert (first, second) == (3, 1)
    assert left == [True, False, False, False]


@pytest.mark.leaves_running
@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
async def test_a_job_that_is_not_final_never_goes_however_old(engine: AsyncEngine, state: JobState) -> None:
    job_id = await a_job(engine, state=state, finished_at=datetime.now(UTC) - WEEK * 9)

    pruned = await prune(engine, state)

    assert pruned == 0
    assert await row(engine, job_id) is not None


async def test_a_row_that_somebody_is_moving_is_passed_by(engine: AsyncEngine) -> None:
    job_id = await finished(engine, JobState.FAILED, WEEK * 2)

    async with engine.connect() as other:
        await other.execute(text("UPDATE exarq.job SET state = 'queued' WHERE id = :id"), {"id": job_id})
        pruned = await prune(engine, JobState.FAILED)
        await other.commit()

    assert pruned == 0
    assert (await row(engine, job_id)).state == JobState.QUEUED
