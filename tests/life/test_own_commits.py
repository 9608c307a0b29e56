"""Commits of a job's own, when the process between two of them is killed."""

from __future__ import annotations

import signal

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.life import jobs_for_tests as jobs
from tests.processes import worker_process
from tests.support import row, state, until
from worker.settings import Settings

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


async def test_a_killed_workers_job_goes_on_after_its_last_commit_elsewhere(
    engine: AsyncEngine, sessions: async_sessionmaker[AsyncSession], settings: Settings
) -> None:
    await jobs.make_effects(engine)
    (job_id,) = await jobs.enqueue_all(sessions, jobs.steps.call(60, stuck_at=30))
    async with worker_process(settings, engine, worker_lease=10) as victim:

        async def is_halfway() -> bool:
            return len(await jobs.effects(engine)) == 30

        await until(is_halfway, "some steps are committed")
        victim.send(signal.SIGKILL)
        await victim.ended()
    async with worker_process(settings, engine, worker_lease=10):

        async def is_done() -> bool:
            return await state(engine, job_id) == "succeeded"

        await until(is_done, "another worker has ended it", 120)

    found = await row(engine, job_id)
    assert await jobs.effects(engine) == [f"step {step:03}" for step in range(60)]
    assert found.result == 30
    assert (found.attempt, found.crashes, found.failures) == (2, 1, 0)
