"""handle.result(): what the job returned, or why it did not, told in a moment and seen by a look all the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.broker.listeners import end_subscriptions, listeners
from tests.cancelling import execute
from tests.flow.helpers import NAME, a_work_with, registry_of, run_job
from tests.proxy import redis_proxy
from tests.support import a_job, a_worker, run_all, until
from worker.broker.connection import connect
from worker.broker.keys import ended_channel
from worker.client import Client
from worker.core.context import JobContext
from worker.core.errors import (
    JobCancelled,
    JobFailed,
    NotCommitted,
    ResultInvalid,
    ResultTimeout,
    SchemaNotMigrated,
)
from worker.core.outcome import Cancel, Fail
from worker.core.registry import Registry
from worker.core.states import Ending, JobState
from worker.db import ends
from worker.db.ids import uuid7
from worker.flow import waiting
from worker.flow.cancel import cancel
from worker.flow.enqueue import enqueue, enqueue_many
from worker.flow.handle import Handle, handle_of
from worker.flow.job import JobFunction
from worker.flow.publish import Publisher
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]


@dataclass
class Receipt:
    """What a charge returns."""

    invoice: int
    lines: tuple[str, ...]


async def charge(session: AsyncSession, invoice: int, write: bool = True) -> Receipt:
    if write:
        await session.execute(text("INSERT INTO note VALUES (:word)"), {"word": f"invoice {invoice}"})
    return Receipt(invoice, ("a", "b"))


async def raising(ctx: JobContext, how: str) -> None:
    match how:
        case "fail":
            raise Fail("no such invoice")
        case "cancel":
            raise Cancel("not wanted")
        case _:
            raise LookupError("card: declined")


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look by the clock: who learns of an end in this test was told of it."""
    monkeypatch.setattr(waiting, "NET", timedelta(seconds=1000))


@pytest.fixture
async def sessions(sessions: Sessions, publisher: Publisher) -> Any:
    yield sessions
    await publisher.close()


def job_of(fn: Any, **options: Any) -> tuple[JobFunction[Any, ..., Any], Registry]:
    registry = registry_of(fn, **options)
    definition = registry.get(NAME)
    assert isinstance(definition, JobFunction)
    return definition, registry


# ── how it ended ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("note_table", "seldom")
@pytest.mark.parametrize("write", [True, False], ids=["in the job's transaction", "by a flush"])
async def test_a_success_is_told_at_once_and_has_the_functions_own_type(
    sessions: Sessions, settings: Settings, write: bool, redis: ArqRedis
) -> None:
    job, registry = job_of(charge)

    async with _a_worker_that_listens(settings, registry, redis):
        for invoice in range(3):
            async with sessions.begin() as session:
                handle = await job.enqueue(session, invoice, write=write)
            assert await asyncio.wait_for(handle.result(), 30) == Receipt(invoice, ("a", "b"))


@pytest.mark.usefixtures("seldom")
@pytest.mark.parametrize(
    ("how", "raised", "type_", "message"),
    [
        ("raise", JobFailed, "LookupError", "card: declined"),
        ("fail", JobFailed, "worker.core.outcome.Fail", "no such invoice"),
    ],
)
async def test_a_failure_is_raised_with_its_message_its_type_and_its_traceback(
    sessions: Sessions, settings: Settings, how: str, raised: type[JobFailed], type_: str, message: str, redis: ArqRedis
) -> None:
    job, registry = job_of(raising, max_attempts=2)

    async with _a_worker_that_listens(settings, registry, redis):
        async with sessions.begin() as session:
            handle = await job.enqueue(session, how=how)
        with pytest.raises(raised) as caught:
            await asyncio.wait_for(handle.result(), 30)

    error = caught.value
    assert (error.job_id, error.name, error.type, error.message) == (handle.id, NAME, type_, message)
    assert "Traceback" in error.traceback
    assert message in error.traceback
    assert str(error) == f"{NAME} {handle.id} has failed: {type_}: {message}"


@pytest.mark.usefixtures("seldom")
async def test_a_cancelled_job_raises_its_reason(sessions: Sessions, settings: Settings, redis: ArqRedis) -> None:
    job, registry = job_of(raising)

    async with _a_worker_that_listens(settings, registry, redis):
        async with sessions.begin() as session:
            handle = await job.enqueue(session, how="cancel")
        with pytest.raises(JobCancelled, match="was cancelled: not wanted"):
            await asyncio.wait_for(handle.result(), 30)


@pytest.mark.usefixtures("seldom")
async def test_who_waits_for_a_waiting_job_is_told_by_a_worker_that_it_was_cancelled(
    sessions: Sessions, settings: Settings, redis: ArqRedis, publisher: Publisher
) -> None:
    job, registry = job_of(charge)
    async with _a_worker_that_listens(settings, registry, redis):
        async with sessions.begin() as session:
            handle = await job.options(delay=1000).enqueue(session, 7)
        wait = asyncio.ensure_future(handle.result())
        await until(lambda: _listens(redis, publisher), "somebody waits")

        async with sessions.begin() as session:
            await cancel(session, handle.id)

        with pytest.raises(JobCancelled, match="somebody asked"):
            await wait


async def test_a_worker_that_died_is_not_taken_for_an_error_of_the_job(engine: AsyncEngine, sessions: Sessions) -> None:
    job = await a_job(engine, state=JobState.FAILED, token=uuid7(), error="worker 7: stopped beating")
    await execute(
        engine,
        "INSERT INTO exarq.attempt (job_id, token, number, ending) SELECT id, token, 1, :ending FROM exarq.job",
        ending=Ending.CRASHED,
    )

    with pytest.raises(JobFailed) as caught:
        await _handle(sessions, job).result()

    assert (caught.value.type, caught.value.message) == ("", "worker 7: stopped beating")


async def test_a_result_that_no_longer_fits_says_so(engine: AsyncEngine, sessions: Sessions) -> None:
    definition, _ = job_of(charge)
    job = await a_job(engine, name=NAME, state=JobState.SUCCEEDED, result={"total": 3})

    with pytest.raises(ResultInvalid, match="invoice"):
        await handle_of(sessions(), job, definition).result()


async def test_of_a_job_that_is_not_known_here_the_result_is_plain_json(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    job = await a_job(engine, name="elsewhere.job", state=JobState.SUCCEEDED)

    for value in (None, 0, "x", [1, {"a": None}], 1.5, 10**30, "☃"):
        await execute(engine, "UPDATE exarq.job SET result = CAST(:json AS jsonb)", json=json.dumps(value))
        assert await _handle(sessions, job).result(timeout=0) == value


# ── when there is none ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.leaves_running
async def test_a_timeout_says_where_the_job_stands(engine: AsyncEngine, sessions: Sessions) -> None:
    stands: list[tuple[dict[str, Any], str]] = [
        ({}, "queued"),
        ({"failures": 1, "error": "ValueError: 7"}, "to be tried again: its last attempt ended with ValueError: 7"),
        ({"state": JobState.RUNNING, "attempt": 3}, "running, attempt 3, and goes on"),
    ]
    for columns, says in stands:
        job = await a_job(engine, **columns)
        for limit in (0, 0.05, timedelta(milliseconds=50)):
            with pytest.raises(TimeoutError, match=says) as caught:
                await _handle(sessions, job).result(timeout=limit)
            assert isinstance(caught.value, ResultTimeout)
            assert str(job) in str(caught.value)


async def test_a_job_that_is_not_there_is_waited_for_and_then_said_to_be_missing(sessions: Sessions) -> None:
    async with sessions() as session:
        handle = await enqueue(session, NAME)
        await session.rollback()

    with pytest.raises(ResultTimeout, match=f"^{NAME} {handle.id}: no result within 0.05 s; there is no such job"):
        await handle.result(timeout=0.05)


async def test_inside_the_transaction_that_enqueued_it_raises_at_once(engine: AsyncEngine, sessions: Sessions) -> None:
    async with sessions() as session:
        handle = await enqueue(session, NAME)
        with pytest.raises(NotCommitted, match="commit it before you ask"):
            await handle.result()
        async with session.begin_nested():
            (inner,) = await enqueue_many(session, [JobFunction(raising, name=NAME).call(how="")])
        with pytest.raises(NotCommitted):
            await inner.result()
        await session.commit()
        await session.execute(text("SELECT 1"))  # the same session, in its next transaction
        for one in (handle, inner):
            with pytest.raises(ResultTimeout, match="queued"):
                await one.result(timeout=0)

    async with engine.connect() as connection, connection.begin() as outer:
        async with AsyncSession(connection, info=sessions.kw["info"]) as joined:
            handle = await enqueue(joined, NAME)
            await joined.commit()
            with pytest.raises(NotCommitted):
                await handle.result()
        await outer.rollback()


async def test_a_job_that_asks_for_its_own_follow_up_is_told_that_it_would_wait_for_itself(
    engine: AsyncEngine, settings: Settings
) -> None:
    said: list[str] = []

    async def parent(session: AsyncSession) -> None:
        handle = await enqueue(session, "tests.child")
        await session.commit()  # a savepoint's end, for the attempt goes on
        with pytest.raises(NotCommitted) as caught:
            await handle.result()
        said.append(str(caught.value))

    async with a_work_with(settings, parent) as work:
        await run_job(work, await a_job(engine, name=NAME))

    assert len(said) == 1


@pytest.mark.parametrize("limit", [-1, float("nan"), float("inf"), timedelta(seconds=-1)], ids=repr)
async def test_a_timeout_that_is_none_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be 0 or more"):
        await Handle(uuid7(), NAME).result(timeout=limit)


async def test_without_tables_the_advice_is_to_make_them(engine: AsyncEngine, sessions: Sessions) -> None:
    await execute(engine, "DROP SCHEMA exarq CASCADE")

    for limit in (0, None):
        with pytest.raises(SchemaNotMigrated, match="exarq db upgrade"):
            await _handle(sessions, uuid7()).result(timeout=limit)


async def test_a_handle_made_by_hand_knows_no_database() -> None:
    with pytest.raises(TypeError, match="handle_of"):
        await Handle(uuid7(), NAME).result()


# ── who waits ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("seldom", "note_table")
async def test_another_process_that_has_only_the_id_waits_too(
    sessions: Sessions, settings: Settings, redis: ArqRedis
) -> None:
    job, registry = job_of(charge)
    async with Client(settings) as client, _a_worker_that_listens(settings, registry, redis):
        async with sessions.begin() as session:
            handle = await job.enqueue(session, 7)

        plain = await asyncio.wait_for(client.handle(handle.id).result(), 30)
        async with client.sessions() as session:
            typed = await asyncio.wait_for(handle_of(session, handle.id, job).result(), 30)

    assert (plain, typed) == ({"invoice": 7, "lines": ["a", "b"]}, Receipt(7, ("a", "b")))


@pytest.mark.usefixtures("seldom")
async def test_two_hundred_who_wait_share_one_subscription_and_few_looks(
    engine: AsyncEngine,
    sessions: Sessions,
    settings: Settings,
    redis: ArqRedis,
    monkeypatch: pytest.MonkeyPatch,
    publisher: Publisher,
) -> None:
    gate, looks = asyncio.Event(), 0
    stands = ends.stands

    async def counted(*args: Any) -> Any:
        nonlocal looks
        looks += 1
        return await stands(*args)

    async def gated(ctx: JobContext, number: int) -> int:
        await gate.wait()
        return number

    job, registry = job_of(gated)
    monkeypatch.setattr(ends, "stands", counted)
    async with _a_worker_that_listens(settings, registry, redis):
        async with sessions.begin() as session:
            handles = await enqueue_many(session, [job.call(number) for number in range(200)])
        waits = [asyncio.ensure_future(handle.result()) for handle in handles]
        await until(lambda: _listens(redis, publisher), "they wait")
        settled = looks
        gate.set()
        results = await asyncio.gather(*waits)
        subscriptions = await _listens(redis, publisher)

    assert results == list(range(200))
    assert subscriptions == 1
    assert settled <= 5


@pytest.mark.usefixtures("seldom")
async def test_an_end_just_before_the_worker_hears_that_somebody_waits_is_told_all_the_same(
    sessions: Sessions, settings: Settings, engine: AsyncEngine, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, registry = job_of(raising)
    missed: list[UUID] = []

    async def blind(_engine: AsyncEngine, ids: Any) -> dict[UUID, Any]:
        """The look of a waiter that came a moment too soon."""
        monkeypatch.setattr(waiting, "look", look)
        missed.extend(ids)
        return {}

    look = waiting.look
    async with _a_worker_that_listens(settings, registry, redis):
        async with sessions.begin() as session:
            first, second = await enqueue_many(session, [job.call(how="cancel")] * 2)
        for handle in (first, second):
            with pytest.raises(JobCancelled):
                await asyncio.wait_for(handle.result(), 30)
        monkeypatch.setattr(waiting, "look", blind)
        with pytest.raises(JobCancelled):
            await handle_of(sessions(), first.id).result()

    assert missed == [first.id]


async def test_while_redis_is_away_the_rows_are_looked_at(
    engine: AsyncEngine, settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "NET", timedelta(milliseconds=50))
    job, registry = job_of(charge)
    async with redis_proxy(redis_url) as (proxy, url):
        publisher = Publisher(
            connect(url, timeout=timedelta(seconds=1)), lease=settings.worker.lease, closes_redis=True
        )
        proxy.refuse()
        async with AsyncSession(engine, info=publisher.info) as session:
            handle = await job.enqueue(session, 7, write=False)
            await session.commit()
        wait = asyncio.ensure_future(handle.result(timeout=60))
        await run_all(settings, registry)

        assert await wait == Receipt(7, ("a", "b"))
        await publisher.close()


@pytest.mark.usefixtures("seldom")
async def test_a_subscription_that_is_lost_is_taken_up_again(
    sessions: Sessions, settings: Settings, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch, publisher: Publisher
) -> None:
    monkeypatch.setattr(waiting, "NET", timedelta(milliseconds=50))
    wait = asyncio.ensure_future(_handle(sessions, uuid7()).result())
    await until(lambda: _listens(redis, publisher), "somebody waits")

    await end_subscriptions(redis)

    await until(lambda: _listens(redis, publisher), "somebody listens again")
    wait.cancel()
    await asyncio.wait([wait])


async def test_who_waits_when_the_publisher_is_closed_is_told(sessions: Sessions, publisher: Publisher) -> None:
    wait = asyncio.ensure_future(_handle(sessions, uuid7()).result())
    await until(lambda: publisher.waiting._watches, "somebody waits")

    await publisher.close()

    with pytest.raises(RuntimeError, match="closed"):
        await wait


async def test_when_nobody_waits_any_more_nothing_looks(sessions: Sessions, publisher: Publisher) -> None:
    waits = [asyncio.ensure_future(_handle(sessions, uuid7()).result()) for _ in range(3)]
    await until(lambda: publisher.waiting._watches, "they wait")

    for wait in waits:
        wait.cancel()
    await asyncio.wait(waits)

    assert not publisher.waiting._watches
    await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "exarq look"], "none looks")


def _handle(sessions: Sessions, job: UUID) -> Handle[Any]:
    return handle_of(sessions(), job)


async def _listens(redis: ArqRedis, publisher: Publisher) -> int:
    """How many listen for the ends that this publisher's waiters are told of."""
    ((_, count),) = await redis.pubsub_numsub(ended_channel(publisher.waiting._id))
    return int(count)


@asynccontextmanager
async def _a_worker_that_listens(settings: Settings, registry: Registry, redis: ArqRedis) -> AsyncIterator[None]:
    """What was said before it listens, only a look by the clock would make good."""
    async with a_worker(settings, registry) as worker:
        work = await until(lambda: worker.ctx.get("exarq.work"), "the worker has begun")
        await until(lambda: listeners(redis, work.installation), "the worker listens")
        yield
