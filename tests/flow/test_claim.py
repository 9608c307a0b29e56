"""Claim: hints from Redis, jobs from PostgreSQL by key; what cannot be claimed is explained and never lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from arq.connections import ArqRedis
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.proxy import postgres_proxy, redis_proxy
from tests.support import a_job, a_work, heard, hints, payload_ids, row, state, until
from worker.broker import scripts
from worker.broker.hints import Hint, due_at
from worker.broker.keys import PAYLOAD_PREFIX, queue_key
from worker.core.priority import DEFAULT_PRIORITY
from worker.core.states import JobState
from worker.db import reads, transitions
from worker.db.failures import is_away
from worker.db.ids import uuid7
from worker.db.models import Job
from worker.flow import availability
from worker.flow import claim as module
from worker.flow.availability import Availability
from worker.flow.claim import Claimer
from worker.flow.holdings import Run
from worker.flow.work import Work
from worker.observe.events import HintLeftAlone, RedisAway, RedisBack, StepFailed
from worker.settings import Settings, load_settings

AWAY = (DBAPIError, OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)


@asynccontextmanager
async def a_claimer(settings: Settings, *queues: str) -> AsyncIterator[tuple[Claimer, Work]]:
    async with a_work(settings) as work:
        redis = work.context["redis"]
        known = Availability(redis)
        try:
            yield Claimer(work, redis, queues or ("default",), known), work
        finally:
            await known.close()


@pytest.fixture
async def claimer(settings: Settings) -> AsyncIterator[Claimer]:
    async with a_claimer(settings) as (claimer, _):
        yield claimer


async def publish(redis: ArqRedis, work: Work, *ids: UUID, due_in: float = -1.0, queue: str = "default") -> None:
    told = [Hint(id_, "tests.noop", queue, due_at(due_in), 1, work.installation, DEFAULT_PRIORITY) for id_ in ids]
    await scripts.publish(redis, told, lease=work.settings.worker.lease)


async def finished(engine: AsyncEngine, *ids: UUID) -> None:
    async with engine.begin() as connection:
        await connection.execute(update(Job).where(Job.id.in_(ids)).values(state=JobState.CANCELLED))


def ids_of(runs: list[Run]) -> set[UUID]:
    return {run.claimed.held.job_id for run in runs}


async def now_ms(redis: ArqRedis) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


# ── what is claimed ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_hinted_job_is_claimed_and_held(engine: AsyncEngine, redis: ArqRedis, settings: Settings) -> None:
    async with a_claimer(settings) as (claimer, work):
        job, unhinted = await a_job(engine), await a_job(engine)
        await publish(redis, work, job)

        (run,) = await claimer.claim(10)

        found = await row(engine, job)
        assert (found.state, found.token, found.worker_id) == ("running", run.claimed.held.token, work.identity.id)
        assert work.holdings.runs() == {run.claimed.held: run}
        assert await state(engine, unhinted) == "queued"
        await finished(engine, job)


async def test_claimed_ids_leave_redis_with_the_next_claim(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_claimer(settings) as (claimer, work):
        job = await a_job(engine)
        await publish(redis, work, job)

        await claimer.claim(10)
        hidden = await hints(redis)
        await claimer.claim(10)

        assert set(hidden) == {str(job)}
        assert await hints(redis) == {}
        assert await payload_ids(redis) == set()
        await finished(engine, job)


async def test_claimed_ids_leave_redis_at_a_stop_too(engine: AsyncEngine, redis: ArqRedis, settings: Settings) -> None:
    async with a_claimer(settings) as (claimer, work):
        job = await a_job(engine)
        await publish(redis, work, job)
        await claimer.claim(10)

        await claimer.drop_claimed()

        assert await hints(redis) == {}
        await finished(engine, job)


async def test_no_more_is_claimed_than_there_is_room_for(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_claimer(settings) as (claimer, work):
        jobs = [await a_job(engine) for _ in range(5)]
        await publish(redis, work, *jobs)

        runs = await claimer.claim(3)

        assert len(runs) == 3
        assert len(await claimer.claim(3)) == 2
        await finished(engine, *jobs)


async def test_queues_are_asked_in_turn_so_that_none_starves(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_claimer(settings, "busy", "quiet") as (claimer, work):
        busy = [await a_job(engine, queue="busy") for _ in range(6)]
        quiet = await a_job(engine, queue="quiet")
        await publish(redis, work, *busy, queue="busy")
        await publish(redis, work, quiet, queue="quiet")

        first, second = await claimer.claim(1), await claimer.claim(1)

        assert {run.claimed.queue for run in first + second} == {"busy", "quiet"}
        await finished(engine, *busy, quiet)


# ── what cannot be claimed ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_hint_that_came_too_early_is_put_back_with_postgresqls_own_remaining_wait(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_claimer(settings) as (claimer, work):
        due = datetime.now(UTC) + timedelta(minutes=1)
        job = await a_job(engine, run_at=due)
        await publish(redis, work, job)

        before = await now_ms(redis)
        runs = await claimer.claim(10)
        late = (await hints(redis))[str(job)] - due.timestamp() * 1000
        took = await now_ms(redis) - before
        await claimer.claim(10)

        assert runs == []
        assert -500 < late < took + 500
        assert set(await hints(redis)) == await payload_ids(redis) == {str(job)}


async def test_a_job_that_comes_due_between_the_claim_and_the_look_is_claimed_at_once_not_a_lease_later(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_claimer(settings) as (claimer, work):
        job = await a_job(engine, run_at=datetime.now(UTC) + timedelta(minutes=1))
        await publish(redis, work, job)
        real = reads.standings

        async def once_due(connection: AsyncConnection, ids: Any) -> Any:
            await connection.execute(text("UPDATE exarq.job SET run_at = clock_timestamp()"))
            return await real(connection, ids)

        monkeypatch.setattr(reads, "standings", once_due)
        first = await claimer.claim(10)
        monkeypatch.undo()
        second = await claimer.claim(10)

        assert (ids_of(first), ids_of(second)) == (set(), {job})
        await finished(engine, job)


@pytest.mark.hasty
async def test_hints_of_locked_rows_stay_hidden_and_return_by_themselves(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_claimer(settings) as (claimer, work), engine.connect() as other:
        job = await a_job(engine, run_at=datetime.now(UTC) - timedelta(minutes=1))
        await publish(redis, work, job)
        await other.execute(text("SELECT 1 FROM exarq.job FOR UPDATE"))

        before = await now_ms(redis)
        runs = await claimer.claim(10)
        await claimer.claim(10)
        after = await now_ms(redis)
        scores = await hints(redis)
        await other.rollback()

        assert runs == []
        assert before + 2_000 <= scores[str(job)] <= after + 2_000  # the lease
        assert ids_of(await until(lambda: claimer.claim(10), "the hint returns")) == {job}
        await finished(engine, job)


@pytest.mark.parametrize("where", ["succeeded", "failed", "cancelled", "running", "gone"])
async def test_hints_of_jobs_that_do_not_wait_are_dropped(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, where: str
) -> None:
    async with a_claimer(settings) as (claimer, work):
        job = uuid7() if where == "gone" else await a_job(engine, state=JobState(where))
        await publish(redis, work, job)

        async with heard() as told:
            assert await claimer.claim(10) == []
            await claimer.drop_claimed()

        assert await hints(redis) == {}
        assert await payload_ids(redis) == set()
        assert told == []
        await finished(engine, job)


async def test_a_late_drop_spares_the_hint_that_a_rescue_published_meanwhile(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_claimer(settings) as (claimer, work):
        job = await a_job(engine)
        await publish(redis, work, job)
        (run,) = await claimer.claim(10)
        async with engine.begin() as connection:
            await transitions.release_many(connection, [run.claimed.held], "rescued")
        await publish(redis, work, job)

        await claimer.drop_claimed()

        assert set(await hints(redis)) == await payload_ids(redis) == {str(job)}


@pytest.mark.leaves_hints  # of others, or of jobs that it made up
async def test_what_others_put_there_is_left_alone_and_told_once(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_claimer(settings) as (claimer, work):
        another = Hint(uuid7(), "theirs", "default", due_at(-1.0), 1, uuid4(), DEFAULT_PRIORITY)
        await scripts.publish(redis, [another], lease=timedelta(seconds=2))
        await redis.zadd(queue_key("default"), {b"\xff no text": 1})
        mine = await a_job(engine)
        await publish(redis, work, mine)

        async with heard() as told:
            runs = await claimer.claim(10)
            for raw in await redis.zrange(queue_key("default"), 0, -1):
                await redis.zadd(queue_key("default"), {raw: 1})  # they are due again
            await claimer.claim(10)
            await claimer.drop_claimed()

        assert ids_of(runs) == {mine}
        assert {(one.hint, one.owner) for one in told if isinstance(one, HintLeftAlone)} == {
            (str(another.job_id), "another installation"),
            ("\ufffd no text", "plain ARQ"),
        }
        assert len(told) == 2
        assert await payload_ids(redis) == {str(another.job_id)}
        left = set(await redis.zrange(queue_key("default"), 0, -1))
        assert left >= {str(another.job_id).encode(), b"\xff no text"}
        await finished(engine, mine)


async def test_one_suspect_runs_at_a_time_and_the_others_come_back_soon(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    long_ago = datetime.now(UTC) - timedelta(minutes=1)
    async with a_claimer(settings) as (claimer, work):
        suspects = {await a_job(engine, crashes=2, run_at=long_ago) for _ in range(3)}
        innocent = await a_job(engine, run_at=long_ago)
        await publish(redis, work, *suspects, innocent)

        before = await now_ms(redis)
        runs = await claimer.claim(10)
        after = await now_ms(redis)

        running = ids_of(runs) & suspects
        scores = await hints(redis)
        assert len(running) == 1
        assert ids_of(runs) - running == {innocent}
        for waits in suspects - running:
            assert scores[str(waits)] - after <= max(20, after - before) + 1  # as long as the other has run

        for run in runs:
            work.holdings.let_go(run.claimed.held)
        more = await until(lambda: claimer.claim(10), "the next suspect is claimed")
        assert len(ids_of(more)) == 1
        assert ids_of(more) < suspects - running
        await finished(engine, *suspects, innocent)


# ── PostgreSQL away, Redis away ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.leaves_running
async def test_when_the_answer_to_the_claim_is_lost_the_hints_go_back_and_the_token_is_forgotten(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, database_url: str
) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        behind = load_settings(
            database={"url": url}, redis={"url": settings.redis.url, "timeout": 2}, worker={"lease": 2, "beat": 0.2}
        )
        async with a_claimer(behind) as (claimer, work):
            job = await a_job(engine)
            await publish(redis, work, job)
            before = await hints(redis)
            assert await claimer.scan(0) == []  # its connection is open and its statements are known
            proxy.lose_the_answer_to(lambda asked: str(job).replace("-", "") in asked.hex())

            with pytest.raises(AWAY) as caught:
                await claimer.claim(10)
            assert is_away(caught.value)

            await until(lambda: _runs(engine, job), "the claim was executed although its answer was lost")
            assert await hints(redis) == before
            assert work.holdings.runs() == {}
            rows = await reads_running(engine, work)
            assert work.holdings.unknown(rows) == rows


async def _runs(engine: AsyncEngine, job: UUID) -> bool:
    return await state(engine, job) == "running"


async def reads_running(engine: AsyncEngine, work: Work) -> list[Any]:
    async with engine.connect() as connection:
        return list(await reads.running_under(connection, work.identity.id))


async def test_while_postgresql_is_away_the_queue_in_redis_is_not_touched(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, database_url: str
) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        behind = load_settings(
            database={"url": url, "connect_timeout": 1}, redis={"url": settings.redis.url}, worker={"lease": 5}
        )
        async with a_claimer(behind) as (claimer, work):
            job = await a_job(engine)
            await publish(redis, work, job)
            before = await hints(redis)
            proxy.refuse()

            with pytest.raises(AWAY) as caught:
                await claimer.claim(10)
            assert is_away(caught.value)

            assert await hints(redis) == before


@pytest.mark.parametrize(
    "error", [TimeoutError(), ConnectionResetError(), OperationalError("", {}, Exception("terminated"))]
)
async def test_an_error_of_postgresql_is_not_taken_for_one_of_redis(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with a_claimer(settings) as (claimer, work):
        job = await a_job(engine)
        await publish(redis, work, job)
        before = await hints(redis)
        monkeypatch.setattr(transitions, "claim", _raising(error))

        async with heard() as told:
            with pytest.raises(type(error)):
                await claimer.claim(10)

        assert told == []
        assert await hints(redis) == before


def _raising(error: Exception) -> Any:
    async def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return fail


@pytest.mark.leaves_hints  # of others, or of jobs that it made up
@pytest.mark.parametrize("fails", ["the second queue's claim", "the look at what is left", "Redis at the second queue"])
async def test_what_was_claimed_before_something_failed_is_returned_to_be_run(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    async with a_claimer(settings, "default", "second") as (claimer, work):
        job = await a_job(engine)
        await publish(redis, work, job, uuid7())
        second = await a_job(engine, queue="second", run_at=datetime.now(UTC) + timedelta(hours=1))
        await publish(redis, work, second, queue="second")
        if fails == "the look at what is left":
            monkeypatch.setattr(reads, "standings", _raising(TimeoutError("no answer")))
        else:
            place, kind = (scripts, "Redis") if "Redis" in fails else (transitions, "PostgreSQL")
            real = place.claim
            calls: list[str] = []

            async def first_only(*args: Any, **options: Any) -> Any:
                calls.append(kind)
                if len(calls) > 1:
                    raise TimeoutError("no answer")
                return await real(*args, **options)

            monkeypatch.setattr(place, "claim", first_only)
            monkeypatch.setattr(availability, "_PROBE_EVERY", timedelta(hours=1))  # Redis stays away

        async with heard() as told:
            runs = await claimer.claim(10)

        assert ids_of(runs) == {job}
        assert list(work.holdings.runs().values()) == runs
        assert [type(one) for one in told] == ([RedisAway] if "Redis" in fails else [StepFailed])
        await finished(engine, job)


@pytest.mark.leaves_hints  # of a job that it made up
async def test_the_connection_of_an_error_that_is_passed_over_is_given_back(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_claimer(settings) as (claimer, work):
        job = await a_job(engine)
        await publish(redis, work, job, uuid7())
        monkeypatch.setattr(reads, "standings", _raising(TimeoutError("no answer")))
        async with work.claims.connect() as before:
            pass

        runs = await claimer.claim(10)

        assert ids_of(runs) == {job}
        assert before.closed
        await finished(engine, job)


async def test_without_redis_jobs_are_claimed_by_a_scan_and_by_hints_again_when_it_is_back(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, redis_url: str
) -> None:
    async with redis_proxy(redis_url) as (proxy, url):
        behind = load_settings(
            database=settings.database.model_dump(), redis={"url": url, "timeout": 10}, worker={"lease": 5}
        )
        async with a_claimer(behind) as (claimer, work):
            job, elsewhere = await a_job(engine), await a_job(engine, queue="elsewhere")
            proxy.refuse()

            async with heard() as told:
                runs = await claimer.claim(10)
                assert await claimer.claim(10) == []
                proxy.restore()
                await until(lambda: RedisBack() in told, "Redis is back")
                hinted = await a_job(engine)
                await publish(redis, work, hinted)
                again = await claimer.claim(10)

            assert ids_of(runs) == {job}
            assert ids_of(again) == {hinted}
            assert [type(one) for one in told] == [RedisAway, RedisBack]
            assert await state(engine, elsewhere) == "queued"
            await finished(engine, job, hinted)


async def test_a_scan_takes_the_longest_due_and_one_suspect(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async with a_claimer(settings) as (claimer, _):
        now = datetime.now(UTC)
        old = await a_job(engine, run_at=now - timedelta(hours=1))
        new = await a_job(engine, run_at=now - timedelta(minutes=1))
        suspects = {await a_job(engine, crashes=2, run_at=now - timedelta(hours=2)) for _ in range(2)}

        first = await claimer.scan(3)
        second = await claimer.scan(3)

        assert old in ids_of(first)
        assert len(ids_of(first) & suspects) == 1
        assert ids_of(second) <= {new}
        await finished(engine, old, new, *suspects)


@pytest.mark.parametrize("timeout", [3, 30])
async def test_an_idle_wait_is_shorter_than_the_redis_timeout(
    redis: ArqRedis, settings: Settings, timeout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[timedelta] = []

    async def note(_redis: Any, _queues: Any, *, limit: timedelta) -> None:
        limits.append(limit)

    monkeypatch.setattr(scripts, "wait_for_hint", note)
    impatient = load_settings(
        database=settings.database.model_dump(), redis={"url": settings.redis.url, "timeout": timeout}
    )

    async with a_claimer(impatient) as (claimer, _):
        await claimer.claim(10)
        await claimer.wait()

    assert limits == [min(module.LONGEST_WAIT, timedelta(seconds=timeout) * 2 / 3)]


async def test_an_idle_wait_without_hints_does_not_take_redis_for_away(redis: ArqRedis, settings: Settings) -> None:
    impatient = load_settings(database=settings.database.model_dump(), redis={"url": settings.redis.url, "timeout": 4})

    async with a_claimer(impatient) as (claimer, _), heard() as told:
        await claimer.claim(10)
        await claimer.wait()

    assert told == []


async def test_a_wait_ends_with_a_publish(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT", timedelta(minutes=2))
    patient = load_settings(database=settings.database.model_dump(), redis={"url": settings.redis.url, "timeout": 240})
    async with a_claimer(patient) as (claimer, work):
        assert await claimer.claim(1) == []
        waiting = asyncio.create_task(claimer.wait())
        job = await a_job(engine)
        await publish(redis, work, job)

        async with asyncio.timeout(30):
            await waiting
        assert ids_of(await claimer.claim(1)) == {job}
        assert await redis.exists(PAYLOAD_PREFIX + str(job))
        await finished(engine, job)
