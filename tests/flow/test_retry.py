"""Retry by a person: in the caller's transaction, and its hint goes out after the commit only."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.flow.helpers import NAME, registry_of
from tests.support import a_job, attempts, hints, row, run_all, state, until
from worker.broker.keys import lane_key
from worker.client import Client
from worker.core.context import JobContext
from worker.core.outcome import Fail
from worker.core.states import JobState
from worker.db.ids import uuid7
from worker.flow.publish import Publisher
from worker.flow.retry import Retrial, retry
from worker.settings import Settings

pytestmark = pytest.mark.leaves_running

Sessions = async_sessionmaker[AsyncSession]
NOW = datetime.now(UTC)


async def test_the_answer_says_what_came_of_it(engine: AsyncEngine, sessions: Sessions) -> None:
    failed, waits, missing = await a_job(engine, state="failed", finished_at=NOW), await a_job(engine), uuid7()
    keyed = await a_job(engine, state="failed", finished_at=NOW, unique_key="k")
    await a_job(engine, unique_key="k")

    async with sessions.begin() as session:
        answers = [await retry(session, job) for job in (failed, waits, keyed, missing)]

    assert answers == [
        Retrial(failed, "retried", JobState.QUEUED),
        Retrial(waits, "not final", JobState.QUEUED),
        Retrial(keyed, "key taken", JobState.FAILED),
        Retrial(missing, "unknown", None),
    ]


async def test_the_hint_goes_out_after_the_commit_and_not_before(
    engine: AsyncEngine, sessions: Sessions, publisher: Publisher, redis: ArqRedis
) -> None:
    job = await a_job(engine, state="failed", finished_at=NOW, queue="night", priority=2)

    async with sessions() as session:
        await retry(session, job)
        await publisher.flush()
        before = await redis.zrange(lane_key("night", 2), 0, -1)
        await session.commit()
    await publisher.flush()

    assert before == []
    assert await redis.zrange(lane_key("night", 2), 0, -1) == [str(job).encode()]


async def test_a_sync_session_retries_too(engine: AsyncEngine, sessions: Sessions) -> None:
    job = await a_job(engine, state="failed", finished_at=NOW)

    async with sessions.begin() as session:
        answer = await session.run_sync(retry, job)

    assert answer == Retrial(job, "retried", JobState.QUEUED)


async def test_what_rolls_back_was_never_wanted(
    engine: AsyncEngine, sessions: Sessions, publisher: Publisher, redis: ArqRedis
) -> None:
    job = await a_job(engine, state="failed", finished_at=NOW)
    before = await row(engine, job)

    async with sessions() as session:
        await retry(session, job)
        await session.rollback()
    await publisher.flush()

    assert await row(engine, job) == before
    assert await hints(redis) == {}


async def test_a_key_that_is_taken_meanwhile_is_told_and_the_callers_transaction_goes_on(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    job = await a_job(engine, state="failed", finished_at=NOW, unique_key="k")
    other = uuid4()

    async def ours() -> Retrial:
        async with sessions.begin() as session:
            await session.execute(text("CREATE TABLE kept ()"))
            return await retry(session, job)

    async with engine.begin() as connection:
        columns = "(id, name, queue, args, unique_key) VALUES (:id, 'tests.noop', 'default', '{}', 'k')"
        await connection.execute(text(f"INSERT INTO exarq.job {columns}"), {"id": other})
        waiting = asyncio.create_task(ours())
        await until(lambda: _somebody_waits(engine), "the retry waits for the key")
    answer = await waiting

    assert answer == Retrial(job, "key taken", JobState.FAILED)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT to_regclass('kept')"))).scalar() is not None


async def test_a_job_that_was_failed_for_good_runs_once_more_and_may_succeed(
    settings: Settings, engine: AsyncEngine
) -> None:
    async def job(ctx: JobContext) -> int:
        if ctx.attempt == 1:
            raise Fail("not today")
        return ctx.attempt

    registry = registry_of(job)
    job_id = await a_job(engine, name=NAME)
    await run_all(settings, registry)

    async with Client(settings) as client:
        answer = await client.retry(job_id)
    await run_all(settings, registry)

    assert answer.outcome == "retried"
    found = await row(engine, job_id)
    assert (found.state, found.result, found.attempt) == ("succeeded", 2, 2)
    assert [left.ending for left in await attempts(engine, job_id)] == ["failed"]
    assert await state(engine, job_id) == "succeeded"


async def _somebody_waits(engine: AsyncEngine) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with engine.connect() as connection:
        return bool((await connection.execute(text(query))).scalar_one())
