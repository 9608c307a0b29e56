"""Adopt: the row is committed before anything of the job leaves Redis, and early adoption looks at late ids only."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.arq_clients import a_stock_pool
from tests.chaos.servers import private_redis
from tests.support import a_work, heard, hints, payload_ids, until
from worker.broker.connection import connect
from worker.broker.keys import PAYLOAD_PREFIX, queue_key
from worker.db import transitions
from worker.db.ids import adopted_id
from worker.db.send import once
from worker.flow.adopt import adopt
from worker.flow.after_commit import HORIZON
from worker.flow.availability import Availability
from worker.flow.claim import Claimer
from worker.observe.events import StepFailed
from worker.settings import Settings
from worker.upkeep.adopt_early import EarlyAdoption

pytestmark = pytest.mark.leaves_hints


async def adopted(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT arq_id FROM exarq.job ORDER BY arq_id"))).scalars())


async def test_nothing_leaves_redis_before_the_row_is_committed(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[tuple[set[str], set[str], list[str]]] = []
    real = transitions.adopt

    async def looking(connection: AsyncConnection, arrays: Any) -> Any:
        before = await adopted(engine)
        new = await real(connection, arrays)
        there.append((set(await hints(redis)), await payload_ids(redis), before + await adopted(engine)))
        return new

    monkeypatch.setattr(transitions, "adopt", looking)
    async with a_stock_pool(str(settings.redis.url)) as pool, a_work(settings) as work:
        await pool.enqueue_job("later", word="x", _job_id="plain")
        await Claimer(work, work.context["redis"], ["default"], Availability(redis)).claim(5)

        assert there == [({"plain"}, {"plain"}, ["plain"])]


async def test_a_claim_that_postgresql_refuses_leaves_the_job_in_redis(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_connection: AsyncConnection, _arrays: Any) -> Any:
        raise RuntimeError("no room")

    async with a_stock_pool(str(settings.redis.url)) as pool, a_work(settings) as work:
        await pool.enqueue_job("later", word="x", _job_id="plain")
        claimer = Claimer(work, work.context["redis"], ["default"], Availability(redis))
        with monkeypatch.context() as patch:
            patch.setattr(transitions, "adopt", refuse)
            await claimer.claim(5)
        left = set(await hints(redis)), await payload_ids(redis)
        await redis.zadd(queue_key("default"), {"plain": 1})  # as after the lease
        await claimer.claim(5)

    assert left == ({"plain"}, {"plain"})
    assert await adopted(engine) == ["plain"]


async def test_what_a_claim_has_hidden_is_not_taken_for_deferred(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    lease = settings.worker.lease
    async with a_stock_pool(str(settings.redis.url)) as pool, a_work(settings) as work:
        await pool.enqueue_job("later", _job_id="hidden", _defer_by=lease - timedelta(seconds=1))
        await pool.enqueue_job("later", _job_id="soon", _defer_by=HORIZON)
        await pool.enqueue_job("later", _job_id="late", _defer_by=HORIZON + lease + timedelta(minutes=1))
        early = EarlyAdoption(work, work.context["redis"], Availability(redis))

        await early.step()

        assert await adopted(engine) == ["late"]
        assert await redis.exists(PAYLOAD_PREFIX + "late")


async def test_what_was_adopted_early_is_not_adopted_round_after_round(
    redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = transitions.adopt

    async def counting(connection: AsyncConnection, arrays: Any) -> Any:
        asked.append(len(arrays["ids"]))
        return await real(connection, arrays)

    monkeypatch.setattr(transitions, "adopt", counting)
    async with a_stock_pool(str(settings.redis.url)) as pool, a_work(settings) as work:
        for number in range(5):
            await pool.enqueue_job("later", _job_id=f"late {number}", _defer_by=timedelta(hours=1))
        before = await hints(redis)
        early = EarlyAdoption(work, work.context["redis"], Availability(redis))
        for _ in range(3):
            await early.step()

        assert asked == [5]
        assert await hints(redis) == before


async def test_deferred_jobs_are_not_kept_waiting_by_the_many_that_are_due(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_stock_pool(str(settings.redis.url)) as pool, a_work(settings) as work:
        await redis.zadd(queue_key("default"), {f"due {number}": 1 for number in range(5_000)})
        await pool.enqueue_job("later", _job_id="late", _defer_by=timedelta(hours=1))
        early = EarlyAdoption(work, work.context["redis"], Availability(redis))

        await early.step()

        assert await adopted(engine) == ["late"]


async def test_what_cannot_be_adopted_keeps_no_other_job_from_it(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_stock_pool(str(settings.redis.url)) as pool, a_work(settings) as work, heard() as told:
        for number in range(3):
            await pool.enqueue_job("later", _job_id=f"good {number}")
        await redis.rpush(PAYLOAD_PREFIX + "bad", "somebody else's")  # type: ignore[misc]
        await redis.zadd(queue_key("default"), {"bad": 1})
        availability = Availability(redis)
        await Claimer(work, work.context["redis"], ["default"], availability).claim(5)

        assert await adopted(engine) == ["good 0", "good 1", "good 2"]
        assert not availability.away
        assert "bad" in await hints(redis)
        assert [event.step for event in told if isinstance(event, StepFailed)] == ["adopt bad"]


async def test_who_never_wants_a_job_to_expire_keeps_no_other_job_from_being_adopted(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_stock_pool(str(settings.redis.url)) as pool, a_work(settings) as work:
        await pool.enqueue_job("later", _job_id="never", _expires=timedelta.max)
        await pool.enqueue_job("later", _job_id="beyond", _expires=10**15)
        await pool.enqueue_job("later", _job_id="other")
        await Claimer(work, work.context["redis"], ["default"], Availability(redis)).claim(5)

        assert await adopted(engine) == ["beyond", "never", "other"]


async def test_two_workers_that_adopt_the_same_jobs_at_once_do_not_deadlock(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    row = text(
        "INSERT INTO exarq.job (id, name, queue, args, state, arq_id, arq_enqueued)"
        " VALUES (:id, 'later', 'default', '{}', 'queued', :arq_id, :at) ON CONFLICT DO NOTHING"
    )
    async with a_stock_pool(str(settings.redis.url)) as pool, a_work(settings) as work:
        given: list[dict[str, Any]] = []
        for arq_id in ("a", "b"):
            job = await pool.enqueue_job("later", _job_id=arq_id)
            info = await job.info() if job else None
            assert info is not None
            at = round(info.enqueue_time.timestamp() * 1000)
            given.append({"id": adopted_id(), "arq_id": arq_id, "at": at})
        first, second = given
        async with engine.connect() as other:
            await other.execute(row, first)
            scores = {"b": 1.0, "a": 2.0}
            mine = asyncio.create_task(
                once(work.processor, lambda connection: adopt(work, redis, connection, "default", scores))
            )
            await until(lambda: _waits_for_a_row(engine), "the other waits for the first row")
            await other.execute(row, second)
            await other.commit()
        await mine

    assert await adopted(engine) == ["a", "b"]


async def _waits_for_a_row(engine: AsyncEngine) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'transactionid'"
    async with engine.connect() as connection:
        return bool((await connection.execute(text(query))).scalar())


async def test_a_look_at_an_empty_queue_is_one_command(settings: Settings) -> None:
    async with private_redis() as own, a_work(settings) as work:
        redis = connect(own.url, timeout=timedelta(seconds=5))
        async with aclosing(redis):
            early = EarlyAdoption(work, redis, Availability(redis))
            await early.step()  # which connects
            before = await redis.info("commandstats")
            await early.step()
            after = await redis.info("commandstats")

    calls = {name: of["calls"] - before.get(name, {"calls": 0})["calls"] for name, of in after.items()}
    assert sum(calls.values()) - calls["cmdstat_info"] == 1


async def test_a_postgresql_that_is_away_is_not_taken_for_a_redis_that_is(
    redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_connection: AsyncConnection, _arrays: Any) -> Any:
        raise ConnectionRefusedError("no PostgreSQL")

    monkeypatch.setattr(transitions, "adopt", refuse)
    async with a_stock_pool(str(settings.redis.url)) as pool, a_work(settings) as work:
        await pool.enqueue_job("later", _job_id="late", _defer_by=timedelta(hours=1))
        availability = Availability(redis)
        with pytest.raises(ConnectionRefusedError):
            await EarlyAdoption(work, work.context["redis"], availability).step()

    assert not availability.away
