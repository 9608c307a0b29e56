"""Redis goes and comes: who hears nothing sees the request with the next beat, and hears again afterwards."""

from __future__ import annotations

from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.broker.listeners import end_subscriptions, listeners
from tests.cancelling import Sessions, are, ask, failures, flag, holds, waiting, with_redis
from tests.flow.helpers import NAME, notes
from tests.proxy import redis_proxy
from tests.support import a_job, a_worker, heard, row, until
from worker.broker.messages import CancelAsked, tell
from worker.embedded import servers as embedded
from worker.observe.events import RedisAway, RedisBack
from worker.settings import Settings

pytestmark = pytest.mark.usefixtures("note_table")


@pytest.mark.parametrize("how", ["refuses", "is silent"])
async def test_while_redis_is_away_a_beat_ends_the_run_and_nobody_complains_twice(
    engine: AsyncEngine,
    sessions: Sessions,
    settings: Settings,
    redis_url: str,
    redis: ArqRedis,
    installation: UUID,
    how: str,
) -> None:
    async with (
        redis_proxy(redis_url) as (proxy, url),
        heard() as events,
        a_worker(with_redis(settings, url), waiting()),
    ):
        await until(lambda: listeners(redis, installation), "the worker listens")
        if how == "refuses":
            proxy.refuse()
        else:
            proxy.silence()
        await until(lambda: any(isinstance(event, RedisAway) for event in events), "Redis is away")
        job = await a_job(engine, name=NAME)
        await until(lambda: are(engine, "running", job), "the job runs")

        await ask(sessions, job)

        await until(lambda: are(engine, "cancelled", job), "a beat ends the run")
        proxy.restore()
    assert len([event for event in events if isinstance(event, RedisAway)]) == 1
    assert len(failures(events)) <= 1
    assert await notes(engine) == []


async def test_the_worker_hears_again_when_redis_is_back(
    engine: AsyncEngine, sessions: Sessions, seldom: Settings, redis_url: str, redis: ArqRedis, installation: UUID
) -> None:
    async with (
        redis_proxy(redis_url) as (proxy, url),
        heard() as events,
        a_worker(with_redis(seldom, url), waiting()),
    ):
        await until(lambda: listeners(redis, installation), "the worker listens")
        proxy.refuse()
        await until(lambda: holds(listeners(redis, installation), lambda n: n == 0), "it listens no longer")
        await until(lambda: any(isinstance(event, RedisAway) for event in events), "Redis is away")
        proxy.restore()
        await until(lambda: any(isinstance(event, RedisBack) for event in events), "Redis is back")
        await until(lambda: listeners(redis, installation), "the worker listens again")
        job = await a_job(engine, name=NAME)
        await until(lambda: are(engine, "running", job), "the job runs")

        await ask(sessions, job)

        await until(lambda: are(engine, "cancelled", job), "the run ends")


async def test_a_subscription_that_is_lost_alone_is_taken_up_again_and_redis_is_not_away(
    engine: AsyncEngine, seldom: Settings, installation: UUID
) -> None:
    with embedded.start(postgres=False) as own:
        async with heard() as events, a_worker(with_redis(seldom, own.urls.redis_url), waiting()) as worker:
            await until(lambda: listeners(worker.pool, installation), "the worker listens")
            await end_subscriptions(worker.pool)
            await until(lambda: failures(events), "it notices")
            await until(lambda: listeners(worker.pool, installation), "it listens again")
            job = await a_job(engine, name=NAME)
            await until(lambda: are(engine, "running", job), "the job runs")

            await flag(engine, job)
            await tell(worker.pool, [CancelAsked(job, (await row(engine, job)).worker_id, installation)])

            await until(lambda: are(engine, "cancelled", job), "the run ends")
    assert not [event for event in events if isinstance(event, RedisAway)]
    assert len(failures(events)) == 1


async def test_a_user_who_may_not_have_the_channel_works_on_and_a_beat_ends_the_run(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    with embedded.start(postgres=False) as own:
        async with heard() as events, a_worker(with_redis(settings, own.urls.redis_url), waiting()) as worker:
            await worker.pool.acl_setuser("default", enabled=True, nopass=True, reset_channels=True)
            await until(lambda: any("NoPermission" in error for error in failures(events)), "the channel is refused")
            job = await a_job(engine, name=NAME)
            await until(lambda: are(engine, "running", job), "the job runs")

            await ask(sessions, job)

            await until(lambda: are(engine, "cancelled", job), "a beat ends the run")
    assert not [event for event in events if isinstance(event, RedisAway)]
    assert len([error for error in failures(events) if "NoPermission" in error]) == 1
