"""Jobs that unchanged ARQ code enqueues: adopted, run, and told to ARQ's own clients before, during and after."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from arq.connections import ArqRedis
from arq.constants import in_progress_key_prefix, result_key_prefix
from arq.jobs import Job, JobStatus
from arq.worker import JobExecutionFailed
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.arq_clients import a_stock_pool
from tests.support import a_worker, heard, run_all, until
from worker.broker.keys import PAYLOAD_PREFIX
from worker.core.context import JobContext
from worker.core.outcome import Retry
from worker.core.registry import Registry
from worker.flow.job import JobFunction
from worker.observe.events import PicklesTrusted
from worker.process import Worker
from worker.settings import Settings

pytestmark = pytest.mark.leaves_hints


@pytest.fixture
async def pool(settings: Settings, redis: ArqRedis) -> AsyncIterator[ArqRedis]:
    async with a_stock_pool(str(settings.redis.url)) as pool:
        yield pool


@pytest.fixture
async def notes(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE note (word text)"))


async def add(session: AsyncSession, first: int, second: int = 1, *, note: str = "none") -> int:
    """Add two numbers and write what came of it."""
    await session.execute(text("INSERT INTO note VALUES (:word)"), {"word": f"{first + second} {note}"})
    return first + second


def registered(*functions: Callable[..., Any], **options: Any) -> Registry:
    registry = Registry()
    for function in functions:
        registry.register(JobFunction(function, name=function.__name__, **options))
    return registry


async def rows(engine: AsyncEngine) -> list[Any]:
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT * FROM exarq.job ORDER BY arq_enqueued"))).all())


async def words(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT word FROM note ORDER BY word"))).scalars())


async def keys(redis: ArqRedis, job: Job) -> set[str]:
    """What Redis holds of this job."""
    found = {key.decode() for key in await redis.keys(f"arq:*{job.job_id}")}
    return found | ({"queue"} if await redis.zscore("arq:queue", job.job_id) is not None else set())


async def enqueued(pool: ArqRedis, name: str, *args: Any, **options: Any) -> Job:
    job = await pool.enqueue_job(name, *args, **options)
    assert job is not None
    return job


# ── what runs, and what is told of it ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("notes")
async def test_a_plain_job_runs_in_a_transaction_and_arqs_client_gets_its_result(
    engine: AsyncEngine, redis: ArqRedis, pool: ArqRedis, settings: Settings
) -> None:
    job = await enqueued(pool, "add", 2, 3, note="plain")
    before = await job.status()
    async with a_worker(settings, registered(add)):
        result = await job.result(timeout=30, poll_delay=0.02)

    (found,) = await rows(engine)
    info = await job.result_info()
    assert (before, result, await job.status()) == (JobStatus.queued, 5, JobStatus.complete)
    assert await words(engine) == ["5 plain"]
    assert (found.state, found.args, found.arq_id) == (
        "succeeded",
        {"first": 2, "second": 3, "note": "plain"},
        job.job_id,
    )
    assert info is not None
    assert (info.function, info.args, info.kwargs, info.success, info.job_try) == (
        "add",
        (2, 3),
        {"note": "plain"},
        True,
        1,
    )
    assert (info.enqueue_time.timestamp() * 1000, info.queue_name) == (found.arq_enqueued, "arq:queue")
    assert info.enqueue_time <= info.start_time <= info.finish_time
    assert await keys(redis, job) == {result_key_prefix + job.job_id}
    assert 3500 < await redis.ttl(result_key_prefix + job.job_id) <= 3600


async def test_while_a_plain_job_runs_arqs_client_sees_it_in_progress(
    redis: ArqRedis, pool: ArqRedis, settings: Settings
) -> None:
    go_on = asyncio.Event()

    async def waits(ctx: JobContext, what: str) -> None:
        await go_on.wait()

    job = await enqueued(pool, "waits", "for it")
    async with a_worker(settings, registered(waits)):
        await until(lambda: _is(job, JobStatus.in_progress), "it is in progress")
        info = await job.info()
        again = await pool.enqueue_job("waits", "for nothing", _job_id=job.job_id)
        there = await keys(redis, job)
        go_on.set()
        await job.result(timeout=30, poll_delay=0.02)

    assert info is not None
    assert (info.function, info.args, again) == ("waits", ("for it",), None)
    assert info.score is not None
    assert there == {PAYLOAD_PREFIX + job.job_id, in_progress_key_prefix + job.job_id, "queue"}
    assert not await redis.exists(in_progress_key_prefix + job.job_id)


@pytest.mark.parametrize(
    ("error", "told"),
    [(ValueError("no such thing"), ValueError("no such thing")), (json.JSONDecodeError("bad", "", 0), None)],
    ids=["of Python", "of a library"],
)
async def test_what_a_plain_job_raises_reaches_arqs_client(
    pool: ArqRedis, settings: Settings, error: Exception, told: Exception | None
) -> None:
    async def fails(ctx: JobContext) -> None:
        raise error

    job = await enqueued(pool, "fails")
    await run_all(settings, registered(fails, max_attempts=1))

    with pytest.raises(type(told) if told else JobExecutionFailed) as raised:
        await job.result(timeout=30, poll_delay=0.02)
    assert str(error) in str(raised.value)


async def test_a_retry_of_a_plain_job_is_deferred_until_it_is_due(
    engine: AsyncEngine, redis: ArqRedis, pool: ArqRedis, settings: Settings
) -> None:
    async def later(ctx: JobContext) -> int:
        if ctx.attempt == 1:
            raise Retry(delay=3600)
        return ctx.attempt

    job = await enqueued(pool, "later")
    async with a_worker(settings, registered(later)):
        await until(lambda: _states(engine, "queued", attempt=1), "it waits for its retry")
        await until(lambda: _lacks(redis, in_progress_key_prefix + job.job_id), "it is in progress no longer")
        due = (await rows(engine))[0].run_at.timestamp() * 1000
        await until(lambda: _comes_up(redis, job, due), "its id comes up when it is due")
        status = await job.status()
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET run_at = now()"))
        result = await job.result(timeout=30, poll_delay=0.02)

    assert status is JobStatus.deferred
    assert result == 2


async def test_json_comes_and_goes_where_a_client_speaks_json(pool: ArqRedis, settings: Settings, notes: None) -> None:
    speaks = {"job_serializer": lambda fields: json.dumps(fields).encode(), "job_deserializer": json.loads}
    async with a_stock_pool(str(settings.redis.url), **speaks) as of_json:
        job, broken = await enqueued(of_json, "add", 1, second=1), await enqueued(of_json, "add", "one")
        await run_all(settings, registered(add))

        assert await job.result(timeout=30, poll_delay=0.02) == 2
        with pytest.raises(RuntimeError, match="argument first"):
            await broken.result(timeout=30, poll_delay=0.02)


async def test_a_setting_has_every_pickle_read_and_is_named_in_one_warning(
    pool: ArqRedis, settings: Settings, notes: None
) -> None:
    async def takes(ctx: JobContext, what: Any) -> str:
        return str(what)

    trusting = settings.model_copy(update={"jobs": settings.jobs.model_copy(update={"arq_pickles": "any"})})
    jobs = [await enqueued(pool, "takes", Path("a") / str(number)) for number in range(2)]
    async with heard() as told:
        await run_all(trusting, registered(takes))

    assert [await job.result(timeout=30, poll_delay=0.02) for job in jobs] == ["a/0", "a/1"]
    assert [event.text for event in told if isinstance(event, PicklesTrusted)] == [PicklesTrusted.text]
    assert "jobs.arq_pickles" in PicklesTrusted.text


async def test_a_workers_job_serializer_means_what_it_means_in_arq(
    settings: Settings, redis: ArqRedis, notes: None
) -> None:
    def dumps(fields: dict[str, Any]) -> bytes:
        return b"mine" + json.dumps(fields, default=str).encode()

    def loads(payload: bytes) -> Any:
        return json.loads(payload.removeprefix(b"mine"))

    async with a_stock_pool(str(settings.redis.url), job_serializer=dumps, job_deserializer=loads) as pool:
        job = await enqueued(pool, "add", 1)
        worker = Worker(
            settings,
            registry=registered(add),
            burst=True,
            handle_signals=False,
            job_serializer=dumps,
            job_deserializer=loads,
        )
        try:
            await worker.main()
        finally:
            await worker.close()

        assert await job.result(timeout=30, poll_delay=0.02) == 2


# ── the same enqueue is the same job ────────────────────────────────────────────────────────────────────────────────


async def test_an_old_payload_that_comes_back_is_the_same_job_and_a_later_enqueue_a_new_one(
    engine: AsyncEngine, redis: ArqRedis, pool: ArqRedis, settings: Settings, notes: None
) -> None:
    job = await enqueued(pool, "add", 1, _job_id="daily")
    payload = await redis.get(PAYLOAD_PREFIX + "daily")
    async with a_worker(settings, registered(add)):
        await job.result(timeout=30, poll_delay=0.02)
        await redis.delete(result_key_prefix + "daily")
        await redis.set(PAYLOAD_PREFIX + "daily", payload)  # as an old snapshot of Redis has it
        await redis.zadd("arq:queue", {"daily": 1})
        await until(lambda: _is(job, JobStatus.complete), "the same job is told again")
        await redis.delete(result_key_prefix + "daily")
        again = await enqueued(pool, "add", 2, _job_id="daily")
        second = await again.result(timeout=30, poll_delay=0.02)

    assert second == 3
    assert await words(engine) == ["2 none", "3 none"]
    assert [(one.arq_id, one.state, one.attempt) for one in await rows(engine)] == [("daily", "succeeded", 1)] * 2


async def test_an_id_that_looks_like_ours_is_adopted_too(pool: ArqRedis, settings: Settings, notes: None) -> None:
    job = await enqueued(pool, "add", 1, _job_id="0198c5a0-0000-7000-8000-000000000001")

    await run_all(settings, registered(add))

    assert await job.result(timeout=30, poll_delay=0.02) == 2


# ── when it runs ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_deferred_job_is_adopted_long_before_it_is_due(
    engine: AsyncEngine, redis: ArqRedis, pool: ArqRedis, settings: Settings
) -> None:
    until_then = datetime.now(UTC) + timedelta(days=2)
    by = await enqueued(pool, "add", 1, _defer_by=timedelta(days=1), _job_id="by")
    then = await enqueued(pool, "add", 1, _defer_until=until_then, _job_id="then")
    async with a_worker(settings, registered(add)):
        await until(lambda: _count(engine, 2), "both are adopted")
        await redis.delete(*await redis.keys("arq:*"))

    first, second = sorted(await rows(engine), key=lambda one: one.run_at)
    assert (first.arq_id, second.arq_id) == ("by", "then")
    assert abs(first.run_at - first.enqueued_at - timedelta(days=1)) < timedelta(seconds=5)
    assert abs(second.run_at - until_then) < timedelta(seconds=5)
    assert (first.expires_at, second.expires_at, first.state) == (None, None, "queued")
    assert (by.job_id, then.job_id) == ("by", "then")


async def test_a_job_that_was_adopted_early_is_deferred_until_it_is_due_and_then_runs(
    engine: AsyncEngine, redis: ArqRedis, pool: ArqRedis, settings: Settings, notes: None
) -> None:
    job = await enqueued(pool, "add", 1, _defer_by=100)
    async with a_worker(settings, registered(add)):
        await until(lambda: _count(engine, 1), "it is adopted")
        before = await job.status()
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET run_at = now()"))
        assert await job.result(timeout=30, poll_delay=0.02) == 2

    assert before is JobStatus.deferred


async def test_expires_is_honoured_and_arqs_own_day_is_no_deadline(
    engine: AsyncEngine, pool: ArqRedis, settings: Settings, notes: None
) -> None:
    deadline = await enqueued(pool, "add", 1, _expires=timedelta(hours=3), _defer_by=100)
    async with a_worker(settings, registered(add)):
        await until(lambda: _count(engine, 1), "it is adopted")
        (found,) = await rows(engine)
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET run_at = now(), expires_at = now() - interval '1 s'"))
        with pytest.raises(JobExecutionFailed, match="expired"):
            await deadline.result(timeout=30, poll_delay=0.02)

    assert abs(found.expires_at - found.enqueued_at - timedelta(hours=3)) < timedelta(seconds=5)
    assert await words(engine) == []


async def test_a_payload_that_had_expired_before_it_was_adopted_is_told_as_arq_tells_it(
    engine: AsyncEngine, redis: ArqRedis, pool: ArqRedis, settings: Settings
) -> None:
    job = await enqueued(pool, "add", 1)
    await redis.delete(PAYLOAD_PREFIX + job.job_id)

    await run_all(settings, registered(add))

    with pytest.raises(JobExecutionFailed, match="job expired"):
        await job.result(timeout=30, poll_delay=0.02)
    assert await rows(engine) == []


async def test_job_try_is_the_number_of_the_first_attempt(
    engine: AsyncEngine, pool: ArqRedis, settings: Settings
) -> None:
    tries: list[int] = []

    async def fails(ctx: JobContext) -> None:
        tries.append(ctx.attempt)
        raise ValueError("again")

    await enqueued(pool, "fails", _job_try=3)
    async with a_worker(settings, registered(fails, max_attempts=4)):
        await until(lambda: _ended(engine), "it has failed")

    assert tries == [3, 4]


# ── what cannot run ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_arguments_that_do_not_fit_fail_the_job_with_what_is_wrong(
    engine: AsyncEngine, pool: ArqRedis, settings: Settings
) -> None:
    jobs = [
        await enqueued(pool, "add", 1, 2, 3, _job_id="too many"),
        await enqueued(pool, "add", "one", _job_id="no number"),
        await enqueued(pool, "add", 1, colour="red", _job_id="unknown"),
    ]
    await run_all(settings, registered(add))

    found = {one.arq_id: one for one in await rows(engine)}
    assert {(one.state, one.attempt, one.name) for one in found.values()} == {("failed", 0, "add")}
    assert "takes at most 2 arguments by position, got 3" in found["too many"].error
    assert "argument first" in found["no number"].error
    assert "unknown argument 'colour'" in found["unknown"].error
    for job in jobs:
        with pytest.raises(JobExecutionFailed, match="ArgumentsInvalid"):
            await job.result(timeout=30, poll_delay=0.02)


class OfAClient:
    """A class that only the client has, as far as a worker may know."""


async def test_what_cannot_be_read_is_kept_as_failed_with_its_bytes(
    engine: AsyncEngine, redis: ArqRedis, pool: ArqRedis, settings: Settings
) -> None:
    job = await enqueued(pool, "add", OfAClient())
    payload = await redis.get(PAYLOAD_PREFIX + job.job_id)
    for garbage in (b"garbage", b'{"no": "job"}', pickle.dumps({"f": 7})):
        await redis.set(PAYLOAD_PREFIX + garbage.hex(), garbage)
        await redis.zadd("arq:queue", {garbage.hex(): 1})

    await run_all(settings, registered(add))
    await redis.zadd("arq:queue", {b"garbage".hex(): 1})
    await redis.set(PAYLOAD_PREFIX + b"garbage".hex(), b"garbage")
    await run_all(settings, registered(add))

    found = {one.arq_id: one for one in await rows(engine)}
    kept = {id_: _bytes(one.args["payload_base64"]) for id_, one in found.items()}
    assert kept.pop(job.job_id) == payload
    assert all(raw.hex() == id_ for id_, raw in kept.items())
    assert len(kept) == 3
    assert {(one.state, one.name) for one in found.values()} == {("failed", "arq.unreadable")}
    assert "tests.life.test_plain_arq.OfAClient" in found[job.job_id].error
    assert "jobs.arq_pickles" in found[job.job_id].error
    with pytest.raises(JobExecutionFailed, match="only plain data is read"):
        await job.result(timeout=30, poll_delay=0.02)


async def test_positions_wait_for_a_worker_that_knows_the_function(
    engine: AsyncEngine, pool: ArqRedis, settings: Settings, notes: None
) -> None:
    job = await enqueued(pool, "add", 1, 2, note="late")
    async with a_worker(settings, registered(_other)):
        await until(lambda: _count(engine, 1), "it is adopted")
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET run_at = now() WHERE state = 'queued'"))
    async with a_worker(settings, registered(add)):
        assert await job.result(timeout=30, poll_delay=0.02) == 3


async def _other(ctx: JobContext) -> None:
    """Another function."""


# ── abort ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_arqs_abort_ends_what_runs_and_what_waits(
    engine: AsyncEngine, redis: ArqRedis, pool: ArqRedis, settings: Settings
) -> None:
    cancelled = asyncio.Event()

    async def endless(ctx: JobContext) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    runs, waits = await enqueued(pool, "endless"), await enqueued(pool, "endless", _defer_by=3600)
    async with a_worker(settings, registered(endless)):
        await until(lambda: _is(runs, JobStatus.in_progress), "one runs")
        await until(lambda: _count(engine, 2), "both are adopted")

        assert await runs.abort(timeout=30, poll_delay=0.02)
        assert await waits.abort(timeout=30, poll_delay=0.02)

    assert cancelled.is_set()
    assert {one.state for one in await rows(engine)} == {"cancelled"}
    assert await redis.zcard("arq:abort") == 0
    assert await keys(redis, waits) == {result_key_prefix + waits.job_id}


async def _is(job: Job, status: JobStatus) -> bool:
    return await job.status() is status


async def _comes_up(redis: ArqRedis, job: Job, due: float) -> bool:
    score = await redis.zscore("arq:queue", job.job_id)
    return score is not None and abs(score - due) < 5_000


async def _lacks(redis: ArqRedis, key: str) -> bool:
    return not await redis.exists(key)


async def _count(engine: AsyncEngine, number: int) -> bool:
    return len(await rows(engine)) == number


async def _ended(engine: AsyncEngine) -> bool:
    found = await rows(engine)
    return bool(found) and all(one.finished_at is not None for one in found)


async def _states(engine: AsyncEngine, state: str, *, attempt: int) -> bool:
    return [(one.state, one.attempt) for one in await rows(engine)] == [(state, attempt)]


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
