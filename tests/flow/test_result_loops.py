"""One publisher for the waits of several event loops, and of loops that are gone."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests.support import a_job, until
from worker.core.states import JobState
from worker.db.ends import Stand
from worker.db.ids import uuid7
from worker.flow import waiting
from worker.flow.publish import Publisher
from worker.testing import NoHints

pytestmark = pytest.mark.leaves_running


async def test_each_of_two_event_loops_that_wait_for_a_job_is_told_in_its_own_thread(
    publisher: Publisher, engine: AsyncEngine, database_url: str
) -> None:
    job = await a_job(engine)
    waits: list[asyncio.AbstractEventLoop] = []

    async def wait() -> Stand:
        other = create_async_engine(database_url, poolclass=NullPool)
        waits.append(asyncio.get_running_loop())
        async with asyncio.timeout(30):
            return await publisher.waiting.until_ended(other, job)

    here, there = asyncio.create_task(wait()), asyncio.create_task(asyncio.to_thread(asyncio.run, wait()))
    await until(lambda: len(waits) == 2, "both wait")
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET state = 'succeeded', finished_at = now()"))

    assert [(await here).state, (await there).state] == [JobState.SUCCEEDED] * 2
    assert waits[0] is not waits[1]
    await publisher.close()


async def test_a_loop_that_was_closed_with_a_wait_in_it_stops_no_later_one(
    engine: AsyncEngine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, missing = await a_job(engine, state=JobState.SUCCEEDED), uuid7()
    publisher, other = NoHints(), create_async_engine(database_url, poolclass=NullPool)
    looked: list[object] = []

    async def look(*args: Any) -> Any:
        looked.append(await real(*args))
        return looked[-1]

    async def wait(job_id: UUID) -> Stand:
        async with asyncio.timeout(30):
            return await publisher.waiting.until_ended(other, job_id)

    def run() -> Stand:
        closed = asyncio.new_event_loop()
        left = closed.create_task(wait(missing))
        closed.run_until_complete(until(lambda: looked, "a look"))
        closed.close()
        left._log_destroy_pending = False  # type: ignore[attr-defined]
        return asyncio.run(wait(job))

    real = waiting.look
    monkeypatch.setattr(waiting, "look", look)

    assert (await asyncio.to_thread(run)).state == JobState.SUCCEEDED
