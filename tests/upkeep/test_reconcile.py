"""Redis may lose anything: within a round it knows every waiting job again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from arq.connections import ArqRedis
from arq.constants import in_progress_key_prefix
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.life import jobs_for_tests as jobs
from tests.proxy import redis_proxy
from tests.servers import MARK
from tests.support import a_job, a_work, a_worker, heard, hints, payload_ids, row, state, until
from worker.broker import scripts
from worker.broker.connection import connect
from worker.broker.keys import queue_key
from worker.core.states import JobState
from worker.db.ids import uuid7
from worker.db.models import Job
from worker.flow.after_commit import HORIZON
from worker.flow.availability import Availability
from worker.flow.enqueue import enqueue
from worker.flow.work import Work
from worker.observe.events import Reconciled, RedisAway
from worker.settings import Settings
from worker.upkeep.reconcile import reconcile, rest_after_a_page, rest_after_a_round

Sessions = async_sessionmaker[AsyncSession]
LEASE = timedelta(seconds=2)


@pytest.fixture
async def work(settings: Settings) -> AsyncIterator[Work]:
    async with a_work(settings) as made:
        yield made


@pytest.fixture
async def availability(redis: ArqRedis) -> AsyncIterator[Availability]:
    made = Availability(redis)
    yield made
    await made.close()


async def test_a_wiped_redis_knows_all_jobs_after_one_walk(
    engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability
) -> None:
    ids = await _many_jobs(engine, 5_000)
    await _wipe(redis)

    async with heard() as events:
        await _walk_to_the_end(work, redis, availability)

    assert set(await hints(redis)) == await payload_ids(redis) == ids
    assert [event.hints for event in events if isinstance(event, Reconciled)] == [1_000] * 5


async def test_a_job_that_comes_due_does_not_wait_for_the_walk_through_a_backlog(
    engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability
) -> None:
    await _many_jobs(engine, 1_500)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET run_at = run_at - interval '1 hour'"))
    soon = await a_job(engine, run_at=datetime.now(UTC) + timedelta(seconds=1))

    await reconcile(work, redis, availability)

    assert str(soon) in await hints(redis)


async def test_pages_with_misses_follow_at_once_and_clean_ones_after_a_rest(
    engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability
) -> None:
    await _many_jobs(engine, 2_500)

    rests_of_the_first_round = await _walk_to_the_end(work, redis, availability)
    await _make_due(engine)
    first_of_the_second = await reconcile(work, redis, availability)

    assert rests_of_the_first_round == [timedelta(0), timedelta(0), None]
    assert first_of_the_second is not None
    assert first_of_the_second > timedelta(0)


@pytest.mark.parametrize(("took_ms", "rest_ms"), [(1, 300), (10, 300), (15, 450), (5_000, 500)])
def test_after_a_clean_page_it_rests_the_longer_the_longer_that_took(took_ms: int, rest_ms: int) -> None:
    took = timedelta(milliseconds=took_ms)

    assert rest_after_a_page(took, clean=True) == timedelta(milliseconds=rest_ms)


@pytest.mark.parametrize(("read_ms", "rest_s"), [(1, 1), (100, 1), (800, 8), (60_000, 10)])
def test_after_a_round_it_rests_the_longer_the_longer_that_took_and_far_less_than_the_horizon(
    read_ms: int, rest_s: int
) -> None:
    assert rest_after_a_round(timedelta(milliseconds=read_ms)) == timedelta(seconds=rest_s)
    assert timedelta(seconds=rest_s) <= HORIZON / 3


def test_after_a_page_with_misses_it_does_not_rest_however_long_that_took() -> None:
    assert rest_after_a_page(timedelta(seconds=5), clean=False) == timedelta(0)


@pytest.mark.parametrize("damage", ["hint", "score far away"])
async def test_one_astray_hint_is_put_back(
    damage: str, engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability
) -> None:
    ids = sorted(await _many_jobs(engine, 10))
    await _walk_to_the_end(work, redis, availability)
    sound = await hints(redis)
    if damage == "hint":
        await redis.zrem(queue_key("default"), ids[4])
    else:
        await redis.zadd(queue_key("default"), {ids[4]: sound[ids[4]] + 3_600_000})

    async with heard() as events:
        await _walk_to_the_end(work, redis, availability)

    assert [event.hints for event in events if isinstance(event, Reconciled)] == [1]
    assert (await hints(redis))[ids[4]] == pytest.approx(sound[ids[4]], abs=10_000)


async def test_what_a_dead_process_of_arqs_command_had_picked_is_free_to_be_picked_again(
    engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability
) -> None:
    (picked,) = await _many_jobs(engine, 1)
    await redis.psetex(in_progress_key_prefix + picked, 86_400_000, b"1")

    await _walk_to_the_end(work, redis, availability)

    assert not await redis.exists(in_progress_key_prefix + picked)


async def test_a_job_whose_transaction_committed_late_is_found_in_the_next_round(
    engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability
) -> None:
    await _many_jobs(engine, 1_500)
    late = uuid7()
    async with engine.begin() as connection:  # still open while the walk passes its place
        await connection.execute(insert(Job).values(**_values(late, minutes=-60)))
        await _walk_to_the_end(work, redis, availability)
        missing = str(late) not in await hints(redis)

    await _walk_to_the_end(work, redis, availability)

    assert missing
    assert str(late) in await hints(redis)


async def test_a_job_enqueued_in_a_session_that_joined_a_transaction_is_found(
    engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability, sessions: Sessions
) -> None:
    async with engine.connect() as connection:
        transaction = await connection.begin()
        async with sessions(bind=connection) as session:
            handle = await enqueue(session, "tests.nothing")
            await session.commit()
        await transaction.commit()

    await _walk_to_the_end(work, redis, availability)

    assert str(handle.id) in await hints(redis)


async def test_hints_arrive_within_the_horizon_and_not_before(
    engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability
) -> None:
    due = _in(20)
    soon, later = await a_job(engine, run_at=due), await a_job(engine, run_at=_in(90))

    await _walk_to_the_end(work, redis, availability)

    found = await hints(redis)
    assert set(found) == {str(soon)}
    assert found[str(soon)] / 1000 == pytest.approx(due.timestamp(), abs=5)
    assert await state(engine, later) == "queued"


async def test_a_hint_that_a_claim_has_hidden_is_left_alone_and_comes_back_after_the_lease(
    engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability
) -> None:
    await a_job(engine)
    await _walk_to_the_end(work, redis, availability)
    taken = await scripts.claim(redis, "default", limit=10, lease=LEASE)

    async with heard() as events:
        await _walk_to_the_end(work, redis, availability)

    assert [raw.decode() for raw in taken.hints] == list(await hints(redis))
    assert list((await hints(redis)).values()) == [taken.score]
    assert [event for event in events if isinstance(event, Reconciled)] == []
    await until(lambda: _claims_some(redis), "the hint is due again")


async def test_the_hints_of_an_old_snapshot_leave_without_harm(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, redis: ArqRedis
) -> None:
    await jobs.make_effects(engine)
    async with a_worker(settings, jobs.registry()):
        done = await jobs.enqueue_all(sessions, *(jobs.note.call(f"{n}") for n in range(5)))
        await until(lambda: _all_succeeded(engine, 5), "the jobs are done")

        await redis.zadd(queue_key("default"), {str(job): 1.0 for job in done})

        await until(lambda: _no_hints(redis), "the hints have left")
    assert await jobs.effects(engine) == ["0", "1", "2", "3", "4"]
    assert {(await row(engine, job)).attempt for job in done} == {1}


async def test_a_running_worker_heals_a_wipe(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, redis: ArqRedis
) -> None:
    later = await _many_jobs(engine, 50, run_at=_in(25))
    async with a_worker(settings, jobs.registry()):
        await until(lambda: _known(redis, later), "Redis knows the jobs")

        await _wipe(redis)

        await until(lambda: _known(redis, later), "Redis knows them again")
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET run_at = clock_timestamp()"))
        await until(lambda: _all_succeeded(engine, 50), "all have run")


async def test_one_worker_walks_at_a_time(
    engine: AsyncEngine, redis: ArqRedis, work: Work, availability: Availability, settings: Settings
) -> None:
    await _many_jobs(engine, 100)

    async with a_work(settings) as second, a_work(settings) as third, heard() as events:
        await asyncio.gather(*(reconcile(each, redis, availability) for each in (work, second, third)))

    assert [event.hints for event in events if isinstance(event, Reconciled)] == [100]


async def test_the_walk_waits_while_redis_is_away_and_goes_on_where_it_was(
    engine: AsyncEngine, redis: ArqRedis, redis_url: str, work: Work
) -> None:
    ids = await _many_jobs(engine, 10)
    async with redis_proxy(redis_url) as (proxy, url):
        client = connect(url, timeout=timedelta(seconds=10))
        availability = Availability(client)
        proxy.refuse()

        async with heard() as events:
            rests = [await reconcile(work, client, availability) for _ in range(3)]
        away = availability.away
        proxy.restore()
        await until(lambda: not availability.away, "Redis is back")
        await _walk_to_the_end(work, client, availability)

        await availability.close()
        await client.aclose()
    assert (rests, away) == ([None, None, None], True)
    assert len([event for event in events if isinstance(event, RedisAway)]) == 1
    assert set(await hints(redis)) == ids


async def _walk_to_the_end(work: Work, redis: ArqRedis, availability: Availability) -> list[timedelta | None]:
    """One round, whatever rest the last one earned; returns what each step said."""
    rests: list[timedelta | None] = []
    while not rests or rests[-1] is not None:
        await _make_due(work.processor)
        rests.append(await reconcile(work, redis, availability))
    return rests


async def _make_due(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.upkeep SET due_at = clock_timestamp()"))


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def _values(job: Any, *, minutes: float = -1, run_at: datetime | None = None) -> dict[str, Any]:
    return {
        "id": job,
        "name": "tests.nothing",
        "queue": "default",
        "args": {},
        "state": JobState.QUEUED,
        "run_at": run_at or _in(60 * minutes),
    }


async def _many_jobs(engine: AsyncEngine, count: int, *, run_at: datetime | None = None) -> set[str]:
    rows = [_values(uuid7(), run_at=run_at) for _ in range(count)]
    async with engine.begin() as connection:
        await connection.execute(insert(Job), rows)
    return {str(row["id"]) for row in rows}


async def _wipe(redis: ArqRedis) -> None:
    mark = await redis.get(MARK)
    assert mark is not None
    await redis.flushdb()
    await redis.set(MARK, mark)


async def _claims_some(redis: ArqRedis) -> bool:
    return bool((await scripts.claim(redis, "default", limit=10, lease=LEASE)).hints)


async def _all_succeeded(engine: AsyncEngine, count: int) -> bool:
    return await jobs.states(engine) == {"succeeded": count}


async def _no_hints(redis: ArqRedis) -> bool:
    return not await hints(redis)


async def _known(redis: ArqRedis, ids: set[str]) -> bool:
    return ids <= set(await hints(redis))
