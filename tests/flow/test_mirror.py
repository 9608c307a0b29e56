"""Mirror: a word that comes late changes nothing, one that was lost is said again, and each enqueue has its own end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from arq.connections import ArqRedis
from arq.constants import in_progress_key_prefix, result_key_prefix
from arq.jobs import Job, JobStatus
from arq.worker import JobExecutionFailed
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.arq_clients import a_stock_pool
from tests.support import a_worker, hints, payload_ids, run_all, until
from worker.broker import stock
from worker.broker.keys import PAYLOAD_PREFIX, queue_key
from worker.broker.stock import RESULT_KEPT, Said
from worker.core.context import JobContext
from worker.core.registry import Registry
from worker.flow.job import JobFunction
from worker.settings import Settings

pytestmark = pytest.mark.leaves_hints


@pytest.fixture
async def pool(settings: Settings, redis: ArqRedis) -> AsyncIterator[ArqRedis]:
    async with a_stock_pool(str(settings.redis.url)) as pool:
        yield pool


async def echo(ctx: JobContext, word: str) -> str:
    """Return what it was given."""
    return word


@pytest.fixture
def registry() -> Registry:
    registry = Registry()
    registry.register(JobFunction(echo, name="echo"))
    return registry


async def enqueued(pool: ArqRedis, word: str) -> Job:
    job = await pool.enqueue_job("echo", word, _job_id="daily")
    assert job is not None
    return job


@pytest.mark.parametrize("word", ["runs", "waits"])
async def test_a_word_that_comes_after_the_end_changes_nothing(redis: ArqRedis, pool: ArqRedis, word: str) -> None:
    await enqueued(pool, "x")
    (seen,) = await stock.look(redis, ["daily"])
    late = Said("daily", "default", seen.payload, "runs" if word == "runs" else "waits", timedelta(seconds=10))
    ended = Said("daily", "default", seen.payload, "ended", RESULT_KEPT, b"result")

    await stock.mirror(redis, [ended, late], silence=timedelta(seconds=30))

    assert await hints(redis) == {}
    assert [key async for key in redis.scan_iter("arq:*")] == [f"{result_key_prefix}daily".encode()]


async def test_an_id_that_comes_up_again_after_its_end_leaves_the_queue(
    redis: ArqRedis, pool: ArqRedis, settings: Settings, registry: Registry
) -> None:
    job = await enqueued(pool, "x")
    async with a_worker(settings, registry):
        await job.result(timeout=30, poll_delay=0.02)
        await redis.zadd(queue_key("default"), {"daily": 1})
        await redis.lpush("exarq:wake:default", 1)  # type: ignore[misc]
        await until(lambda: _is_empty(redis), "it has left the queue", 10)

    info = await job.result_info()
    assert info is not None
    assert (info.args, info.result) == (("x",), "x")


async def test_a_later_enqueue_that_has_expired_is_not_told_the_result_of_an_earlier_one(
    engine: AsyncEngine, redis: ArqRedis, pool: ArqRedis, settings: Settings, registry: Registry
) -> None:
    await enqueued(pool, "yesterday")
    await run_all(settings, registry)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET finished_at = now() - interval '1 day'"))
    await redis.delete(f"{result_key_prefix}daily")
    job = await enqueued(pool, "today")
    await redis.delete(f"{PAYLOAD_PREFIX}daily")  # as `_expires` has it

    await run_all(settings, registry)

    with pytest.raises(JobExecutionFailed, match="job expired"):
        await job.result(timeout=30, poll_delay=0.02)


@pytest.mark.hasty
async def test_a_job_that_runs_through_a_wipe_is_in_progress_again(
    redis: ArqRedis, pool: ArqRedis, settings: Settings
) -> None:
    go_on = asyncio.Event()

    async def waits(ctx: JobContext, word: str) -> str:
        await go_on.wait()
        return word

    registry = Registry()
    registry.register(JobFunction(waits, name="echo"))
    job = await enqueued(pool, "x")
    async with a_worker(settings, registry):
        await until(lambda: _is(job, JobStatus.in_progress), "it is in progress")
        await redis.delete(queue_key("default"), *(p + "daily" for p in (PAYLOAD_PREFIX, in_progress_key_prefix)))
        await until(lambda: _is(job, JobStatus.in_progress), "it is in progress again", 10)
        go_on.set()
        assert await job.result(timeout=30, poll_delay=0.02) == "x"

    assert await payload_ids(redis) == set()


async def _is(job: Job, status: JobStatus) -> bool:
    return await job.status() is status


async def _is_empty(redis: ArqRedis) -> bool:
    return await hints(redis) == {}
