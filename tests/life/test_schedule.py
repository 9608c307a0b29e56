"""Two processes and a clock: each tick has one job, also where one of them is killed in the middle of a tick."""

from __future__ import annotations

import signal
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.life.jobs_for_tests import rows, states
from tests.processes import WorkerProcess, worker_process
from tests.support import until
from worker.flow.schedules import pause_schedule
from worker.settings import Settings

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine

NAME = "tests.ticks"
SECOND = timedelta(seconds=1)


@pytest.mark.hasty
async def test_each_tick_has_one_job_also_where_its_worker_is_killed_in_the_middle_of_it(
    engine: AsyncEngine, settings: Settings
) -> None:
    modules: dict[str, Any] = {"jobs_modules": "tests.life.ticking", "jobs_max_crashes": 50}
    async with (
        worker_process(settings, engine, **modules) as one,
        worker_process(settings, engine, **modules) as two,
    ):
        await until(lambda: _succeeded(engine, 3), "three ticks' jobs have run", 60)
        async with engine.connect() as blocker:
            await blocker.execute(text("LOCK TABLE exarq.job IN SHARE MODE"))
            pid = await until(lambda: _in_the_middle_of_a_tick(engine), "a worker has taken a tick", 60)
            victim = await _of_pid((one, two), pid)
            victim.send(signal.SIGKILL)
            await victim.ended()
            tick, released = await _next_tick(engine)
            await blocker.rollback()
        await until(lambda: _has_job(engine, tick), "another has taken it", 60)
        await until(lambda: _succeeded(engine, 8), "the clock goes on", 60)
        async with AsyncSession(engine) as session, session.begin():
            await pause_schedule(session, NAME)
        await until(lambda: _all_ended(engine), "all have ended", 60)

    due = [one for (one,) in await rows(engine, "first_due_at")]
    assert sorted(due) == [min(due) + number * SECOND for number in range(len(due))]
    assert due.count(tick) == 1
    (late,) = [job.enqueued_at - released for job in await rows(engine) if job.first_due_at == tick]
    assert late < timedelta(seconds=10)


async def _succeeded(engine: AsyncEngine, count: int) -> bool:
    return (await states(engine)).get("succeeded", 0) >= count


async def _all_ended(engine: AsyncEngine) -> bool:
    return set(await states(engine)) == {"succeeded"}


async def _in_the_middle_of_a_tick(engine: AsyncEngine) -> int | None:
    """The process whose tick has moved the schedule on and waits to write its job."""
    query = """
        SELECT pid FROM exarq.worker WHERE 'exarq ' || id IN (
            SELECT application_name FROM pg_stat_activity
            WHERE datname = current_database() AND query LIKE 'INSERT INTO exarq.job%' AND wait_event_type = 'Lock')
    """
    async with engine.connect() as connection:
        found: int | None = (await connection.execute(text(query))).scalar()
        return found


async def _of_pid(processes: tuple[WorkerProcess, ...], pid: int) -> WorkerProcess:
    return next(process for process in processes if process.pid == pid)


async def _next_tick(engine: AsyncEngine) -> tuple[datetime, datetime]:
    async with engine.connect() as connection:
        query = text("SELECT next_at, clock_timestamp() FROM exarq.schedule WHERE name = :name")
        next_at, now = (await connection.execute(query, {"name": NAME})).one()
        return next_at, now


async def _has_job(engine: AsyncEngine, tick: datetime) -> bool:
    return tick in [one for (one,) in await rows(engine, "first_due_at")]
