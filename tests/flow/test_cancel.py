"""Cancel: in the caller's transaction, and its worker is told after the commit only."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.broker.listeners import listening
from tests.flow.helpers import NAME, a_work_with, run_job
from tests.support import a_job, a_work, heard, hints, payload_ids, row, state, until
from worker.broker.connection import connect
from worker.broker.messages import CancelAsked, Cancelled, ToWorkers, tell
from worker.core.context import JobContext
from worker.core.errors import SchemaNotMigrated
from worker.core.states import FINAL, JobState
from worker.db import reads
from worker.db.ids import uuid7
from worker.embedded import servers as embedded
from worker.flow.availability import Availability
from worker.flow.cancel import Cancellation, cancel
from worker.flow.claim import Claimer
from worker.flow.enqueue import enqueue
from worker.flow.publish import PUBLISHER, Publisher
from worker.flow.retry import retry
from worker.observe.events import CancelNotTold, PublishFailed
from worker.settings import Settings

pytestmark = pytest.mark.leaves_running

Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture
async def installation(engine: AsyncEngine) -> UUID:
    async with engine.connect() as connection:
        return await reads.installation_id(connection)


async def a_running_job(engine: AsyncEngine) -> tuple[UUID, UUID]:
    """A job that runs, and the worker under whose id it does."""
    worker = uuid7()
    return await a_job(engine, state=JobState.RUNNING, worker_id=worker), worker


# ── what comes of it ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_answer_says_what_came_of_it(engine: AsyncEngine, sessions: Sessions) -> None:
    waits, missing = await a_job(engine), uuid7()
    runs, _ = await a_running_job(engine)

    async with sessions.begin() as session:
        answers = [await cancel(session, job) for job in (waits, runs, missing)]

    assert answers == [
        Cancellation(waits, "cancelled", JobState.CANCELLED),
        Cancellation(runs, "requested", JobState.RUNNING),
        Cancellation(missing, "unknown", None),
    ]
    assert [await state(engine, job) for job in (waits, runs)] == ["cancelled", "running"]


@pytest.mark.parametrize("ended", sorted(FINAL))
async def test_what_has_ended_is_final(engine: AsyncEngine, sessions: Sessions, ended: JobState) -> None:
    job = await a_job(engine, state=ended)

    async with sessions.begin() as session:
        answer = await cancel(session, job)

    assert answer == Cancellation(job, "final", ended)
    assert await state(engine, job) == ended


async def test_a_job_enqueued_and_cancelled_in_one_transaction_was_never_wanted(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    async with sessions.begin() as session:
        handle = await enqueue(session, "tests.noop")
        answer = await cancel(session, handle.id)

    assert answer.outcome == "cancelled"
    assert await state(engine, handle.id) == "cancelled"


async def test_the_hint_of_a_cancelled_job_leaves_redis_with_the_next_claims(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, publisher: Publisher, settings: Settings
) -> None:
    async with sessions.begin() as session:
        handle = await enqueue(session, "tests.noop")
    await publisher.flush()
    async with sessions.begin() as session:
        await cancel(session, handle.id)
    assert await hints(redis)

    async with a_work(settings) as work:
        claimer = Claimer(work, redis, ["default"], Availability(redis))
        claimed = [*await claimer.claim(5), *await claimer.claim(5)]

    assert claimed == []
    assert (await hints(redis), await payload_ids(redis)) == ({}, set())


async def test_without_tables_the_advice_is_to_make_them(engine: AsyncEngine, sessions: Sessions) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA exarq CASCADE"))

    with pytest.raises(SchemaNotMigrated, match="exarq db upgrade"):
        async with sessions.begin() as session:
            await cancel(session, uuid7())


# ── the message ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_worker_is_told_with_the_commit_and_not_before(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, installation: UUID
) -> None:
    job, worker = await a_running_job(engine)

    async with listening(redis, installation) as told:
        async with sessions.begin() as session:
            await cancel(session, job)
            before = await _told_so_far(redis, installation, told)
        await until(lambda: told, "the worker is told")

    assert before == []
    assert told == [CancelAsked(job, worker, installation)]
    assert (await row(engine, job)).cancel_requested


async def test_nobody_is_told_of_what_was_rolled_back_and_of_what_does_not_run_only_that_it_has_ended(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, installation: UUID
) -> None:
    (runs, _), waits, ended = await a_running_job(engine), await a_job(engine), await a_job(engine, state="failed")

    async with listening(redis, installation) as told:
        async with sessions() as session:
            await cancel(session, runs)
            await session.rollback()
            savepoint = await session.begin_nested()
            await cancel(session, runs)
            await savepoint.rollback()
            for job in (waits, ended, uuid7()):
                await cancel(session, job)
            await session.commit()
        seen = await _told_so_far(redis, installation, told)

    assert seen == [Cancelled(waits, installation)]
    assert not (await row(engine, runs)).cancel_requested


async def test_what_a_job_cancels_counts_with_its_own_success_only(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, installation: UUID
) -> None:
    other, worker = await a_running_job(engine)

    async def cancelling(ctx: JobContext, then: str) -> None:
        await cancel(ctx.session, other)
        await ctx.session.commit()
        if then == "raise":
            raise ValueError

    async with a_work_with(settings, cancelling) as work, listening(redis, installation) as told:
        await run_job(work, await a_job(engine, name=NAME, args={"then": "raise"}))
        after_the_failure = await _told_so_far(redis, installation, told), await row(engine, other)
        await run_job(work, await a_job(engine, name=NAME, args={"then": "return"}))
        await until(lambda: told, "the worker is told")

    assert (after_the_failure[0], after_the_failure[1].cancel_requested) == ([], False)
    assert told == [CancelAsked(other, worker, installation)]
    assert (await row(engine, other)).cancel_requested


async def test_a_redis_that_is_away_is_told_of_and_raises_nothing(engine: AsyncEngine, settings: Settings) -> None:
    job, _ = await a_running_job(engine)
    nobody = connect("redis://127.0.0.1:1/0", timeout=settings.redis.timeout)
    publisher = Publisher(nobody, lease=settings.worker.lease, closes_redis=True)

    async with heard() as events, AsyncSession(engine, info={PUBLISHER: publisher}) as session:
        answer = await cancel(session, job)
        await enqueue(session, "tests.noop")
        await session.commit()
        await publisher.close()

    assert answer.outcome == "requested"
    assert (await row(engine, job)).cancel_requested
    assert [event.requests for event in events if isinstance(event, CancelNotTold)] == [1]
    assert [event.hints for event in events if isinstance(event, PublishFailed)] == [1]


async def test_a_user_who_may_not_have_the_channel_publishes_hints_all_the_same(
    engine: AsyncEngine, settings: Settings
) -> None:
    job, _ = await a_running_job(engine)
    with embedded.start(postgres=False) as own:
        redis = connect(str(own.urls.redis_url), timeout=settings.redis.timeout)
        await redis.acl_setuser("default", enabled=True, nopass=True, reset_channels=True)
        publisher = Publisher(redis, lease=settings.worker.lease, closes_redis=True)

        async with heard() as events, AsyncSession(engine, info={PUBLISHER: publisher}) as session:
            for _ in range(2):
                await cancel(session, job)
                await enqueue(session, "tests.noop")
                await session.commit()
                await publisher.flush()
        found = await hints(redis)
        await publisher.close()

    assert len(found) == 2
    assert [event.requests for event in events if isinstance(event, CancelNotTold)] == [1, 1]
    assert not [event for event in events if isinstance(event, PublishFailed)]


async def _told_so_far(redis: ArqRedis, installation: UUID, told: list[ToWorkers]) -> list[Any]:
    """What was heard before a message that is told now; that one is taken away again."""
    mark = CancelAsked(uuid4(), uuid4(), installation)
    await tell(redis, [mark])
    await until(lambda: mark in told, "the mark is heard")
    told.remove(mark)
    return list(told)


async def test_a_job_is_named_by_its_id_or_its_handle_and_by_nothing_else(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        handle = await enqueue(session, "tests.named")
        assert (await cancel(session, handle)).outcome == "cancelled"
        assert (await retry(session, handle)).outcome == "retried"
        for wrong in ("abc", None, str(handle.id)):
            with pytest.raises(TypeError, match="a job is named by its id"):
                await cancel(session, wrong)  # type: ignore[call-overload]
