"""Complete: whatever dies between the function's return and the answer to COMMIT, there is one effect or none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.flow.helpers import NAME, a_work_with, claimed, end_backend, note, notes, run_job, run_new, start
from tests.proxy import Proxy, is_commit, postgres_proxy
from tests.support import a_job, a_locked_row, attempts, heard, hints, row, state, until
from worker.core.outcome import Retry
from worker.db import transitions
from worker.db.engine import RESET_KEY
from worker.flow import complete
from worker.flow.enqueue import enqueue
from worker.flow.work import Work
from worker.observe.events import AttemptEnded, CommitInDoubt, Event, StaleWriteRefused, StepFailed
from worker.settings import Settings, load_settings

pytestmark = pytest.mark.usefixtures("note_table")


async def writes(session: AsyncSession) -> str:
    await note(session, "once")
    return "done"


async def writes_and_commits(session: AsyncSession) -> str:
    await note(session, "once")
    await session.commit()
    return "done"


@asynccontextmanager
async def a_proxied_work(settings: Settings, fn: Any) -> AsyncIterator[tuple[Proxy, Work]]:
    async with postgres_proxy(str(settings.database.url)) as (proxy, url):
        behind = load_settings(
            database={"url": url, "pooler": settings.database.pooler, "connect_timeout": 10},
            redis={"url": settings.redis.url},
            jobs={"first_wait": 0.05, "longest_wait": 0.2},
            worker={"lease": 5},
        )
        async with a_work_with(behind, fn) as work:
            yield proxy, work


def doubts(told: list[Event]) -> list[bool]:
    return [one.committed for one in told if isinstance(one, CommitInDoubt)]


# ── the answer to COMMIT is lost ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fn", [writes, writes_and_commits])
async def test_a_commit_whose_answer_is_cut_off_is_found_in_the_row(
    engine: AsyncEngine, settings: Settings, fn: Any
) -> None:
    async with a_proxied_work(settings, fn) as (proxy, work), heard() as told:
        proxy.lose_the_answer_to(is_commit)

        job_id, _ = await run_new(work, engine)

        found = await row(engine, job_id)
        assert proxy.lost.is_set()
        assert doubts(told) == [True]
        assert (found.state, found.result, found.failures) == ("succeeded", "done", 0)
        assert await notes(engine) == ["once"]
        assert await attempts(engine, job_id) == []
        assert [one.outcome for one in told if isinstance(one, AttemptEnded)] == ["succeeded"]


@pytest.mark.parametrize("fn", [writes, writes_and_commits])
async def test_a_commit_that_never_arrived_is_no_effect_and_the_job_runs_again(
    engine: AsyncEngine, settings: Settings, fn: Any
) -> None:
    async with a_proxied_work(settings, fn) as (proxy, work), heard() as told:
        proxy.keep_from_the_server(is_commit)

        job_id, _ = await run_new(work, engine)
        before = (await state(engine, job_id), await notes(engine))
        await _make_due(engine)
        await run_job(work, job_id)

        assert doubts(told) == [False]
        assert before == ("queued", [])
        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["once"])


async def _make_due(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET run_at = now() - interval '1 second'"))


async def test_a_commit_that_is_cancelled_while_it_waits_is_found_in_the_row(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_proxied_work(settings, writes) as (proxy, work), heard() as told:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        proxy.lose_the_answer_to(is_commit, cut="never")

        task = start(work, run)
        await proxy.lost.wait()
        task.cancel()
        await task

        assert doubts(told) == [True]
        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["once"])
        assert work.holdings.runs() == {}


async def test_a_commit_that_is_never_answered_has_a_limit(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(complete, "_COMPLETION_LIMIT", timedelta(seconds=2))  # it must come as far as the COMMIT

    async with a_proxied_work(settings, writes) as (proxy, work), heard() as told:
        proxy.lose_the_answer_to(is_commit, cut="never")
        job_id, _ = await run_new(work, engine)

        assert doubts(told) == [True]
        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["once"])


async def test_a_success_that_somebody_keeps_from_being_stored_is_no_failure(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(complete, "_COMPLETION_LIMIT", timedelta(seconds=1))

    async with a_work_with(settings, writes, max_attempts=1) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        async with a_locked_row(engine, job_id), heard() as told:
            task = start(work, run)
            await until(lambda: [one for one in told if isinstance(one, StepFailed)], "it is told to wait")
            waits_with = work.processor.sync_engine.pool.checkedout()  # type: ignore[attr-defined]
        await task

        found = await row(engine, job_id)
        assert (found.state, found.failures) == ("queued", 0)
        assert "is the job's row held by an open transaction" in found.error
        assert await notes(engine) == []
        assert waits_with == 0


async def test_a_commit_the_server_refuses_is_not_in_doubt(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> None:
        await session.execute(text("SET CONSTRAINTS ALL DEFERRED"))
        await note(session, "twice")
        await note(session, "twice")

    async with a_work_with(settings, job) as work, heard() as told:
        job_id, _ = await run_new(work, engine)

        (attempt,) = await attempts(engine, job_id)
        assert doubts(told) == []
        assert "duplicate key" in attempt.error
        assert (await row(engine, job_id)).failures == 1
        assert await notes(engine) == []


async def test_a_reset_that_fails_behind_the_commit_leaves_the_success_as_it_is(
    engine: AsyncEngine, settings: Settings
) -> None:
    def reset(_connection: Any, record: Any) -> None:
        record.info[RESET_KEY] = "SET ROLE dropped_since"  # as that of a user's engine may

    async with a_work_with(settings, writes) as work, heard() as told:
        event.listen(work.jobs_engine.sync_engine, "connect", reset)
        job_id, _ = await run_new(work, engine)

        assert doubts(told) == [True]
        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["once"])
        assert [one.outcome for one in told if isinstance(one, AttemptEnded)] == ["succeeded"]


# ── the attempt dies, or is stale ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("commits", [False, True])
async def test_a_job_whose_connection_dies_before_its_completion_leaves_nothing_and_runs_again(
    engine: AsyncEngine, settings: Settings, commits: bool
) -> None:
    runs: list[int] = []

    async def job(session: AsyncSession) -> None:
        runs.append((await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())
        await note(session, "once")
        if commits:
            await session.commit()
        if len(runs) == 1:
            await end_backend(engine, runs[0])

    async with a_work_with(settings, job) as work, heard() as told:
        job_id, _ = await run_new(work, engine)
        before = (await state(engine, job_id), await notes(engine))
        await _make_due(engine)
        await run_job(work, job_id)

        assert before == ("queued", [])
        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["once"])
        assert doubts(told) == [False]  # the completion goes in the message of the COMMIT


@pytest.mark.parametrize("commits", [False, True])
async def test_an_attempt_that_lost_its_job_is_rolled_back_and_told(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, commits: bool
) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "stale")
        await enqueue(session, "tests.follow_up")
        if commits:
            await session.commit()
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET token = gen_random_uuid(), attempt = 2"))

    async with a_work_with(settings, job) as work, heard() as told:
        job_id, _ = await run_new(work, engine)
        await work.publisher.flush()

        found = await row(engine, job_id)
        assert (found.state, found.attempt, found.result) == ("running", 2, None)
        assert await notes(engine) == []
        assert [type(one) for one in told] == [StaleWriteRefused]
        assert await attempts(engine, job_id) == []
        assert await hints(redis) == {}
        assert work.holdings.runs() == {}
        await _finish(engine)


async def _finish(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET state = 'cancelled'"))


async def test_a_failed_attempt_that_lost_its_job_changes_nothing(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> None:
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET token = gen_random_uuid(), attempt = 2"))
        raise ValueError("too late")

    async with a_work_with(settings, job) as work, heard() as told:
        job_id, _ = await run_new(work, engine)

        found = await row(engine, job_id)
        assert (found.state, found.failures, found.error) == ("running", 0, None)
        assert [type(one) for one in told] == [StaleWriteRefused]
        await _finish(engine)


async def test_the_answer_to_how_an_attempt_ended_is_waited_for(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> None:
        raise ValueError("no")

    async with a_proxied_work(settings, job) as (proxy, work):
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        proxy.keep_from_the_server(lambda asked: b"ValueError" in asked)

        await start(work, run)

        assert proxy.lost.is_set()
        assert (await row(engine, job_id)).failures == 1
        assert len(await attempts(engine, job_id)) == 1


async def test_a_rejection_that_cannot_be_stored_gives_the_row_to_the_next_beat(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_work_with(settings, writes) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)

        async def fail(*_args: Any, **_kwargs: Any) -> None:
            raise RuntimeError("unexpected")

        monkeypatch.setattr(transitions, "retry", fail)
        monkeypatch.setattr(transitions, "fail", fail)
        async with heard() as told:
            await complete.reject(work, run, ValueError("refused"))

        assert work.holdings.runs() == {}
        assert [type(one) for one in told] == [StepFailed]
        await _finish(engine)


async def test_an_outcome_that_postgresql_refuses_ends_the_job(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(session: AsyncSession) -> None:
        raise RuntimeError("once")

    async def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise ValueError("cannot be encoded")

    monkeypatch.setattr(transitions, "retry", refuse)
    async with a_work_with(settings, fails) as work:
        job_id, _ = await run_new(work, engine)

        found = await row(engine, job_id)
        assert (found.state, found.error) == ("failed", "ValueError: cannot be encoded")
        assert work.holdings.runs() == {}


# ── follow-ups ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_follow_ups_are_published_after_the_workers_commit_and_not_before(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    seen: list[Any] = []
    works: list[Work] = []

    async def job(session: AsyncSession) -> str:
        async with session.begin_nested():
            kept = await enqueue(session, "tests.kept")
        nested = await session.begin_nested()
        await enqueue(session, "tests.forgotten")
        await nested.rollback()
        await session.commit()
        await enqueue(session, "tests.rolled_back")
        await session.rollback()
        last = await enqueue(session, "tests.last")
        await works[0].publisher.flush()
        seen.append((await hints(redis), await state(engine, kept.id)))
        return f"{kept.id} {last.id}"

    async with a_work_with(settings, job) as work:
        works.append(work)
        job_id, _ = await run_new(work, engine)
        await work.publisher.flush()

        assert seen == [({}, None)]
        assert set(await hints(redis)) == set((await row(engine, job_id)).result.split())


async def test_a_follow_ups_delay_counts_from_its_enqueue_not_from_the_commit(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    moments: list[float] = []

    async def job(session: AsyncSession) -> str:
        moments.append(time.monotonic())
        handle = await enqueue(session, "tests.later", delay=5)
        await session.commit()
        moments.append(time.monotonic())
        await session.execute(text("SELECT pg_sleep(0.4)"))
        moments.append(time.monotonic())
        return str(handle.id)

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)
        await work.publisher.flush()
        moments.append(time.monotonic())

        later = UUID((await row(engine, job_id)).result)
        score = (await hints(redis))[str(later)] / 1000
        on_the_way = (moments[1] - moments[0]) + (moments[3] - moments[2])  # all but the job's own sleep
        assert -0.01 <= score - (await row(engine, later)).run_at.timestamp() <= on_the_way


async def test_a_failed_attempts_follow_ups_neither_exist_nor_are_published(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    ids: list[UUID] = []

    async def job(session: AsyncSession) -> None:
        ids.append((await enqueue(session, "tests.follow_up")).id)
        await session.commit()
        raise Retry(delay=60)

    async with a_work_with(settings, job) as work:
        await run_new(work, engine)
        await work.publisher.flush()

        assert await state(engine, ids[0]) is None
        assert await hints(redis) == {}


async def test_a_lost_answer_to_commit_publishes_the_follow_ups_all_the_same(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> str:
        return str((await enqueue(session, "tests.follow_up")).id)

    async with a_proxied_work(settings, job) as (proxy, work):
        proxy.lose_the_answer_to(is_commit)
        job_id, _ = await run_new(work, engine)
        await work.publisher.flush()

        assert set(await hints(redis)) == {(await row(engine, job_id)).result}


async def test_what_runs_at_the_same_time_does_not_share_a_transaction(engine: AsyncEngine, settings: Settings) -> None:
    both = asyncio.Barrier(2)

    async def job(session: AsyncSession, word: str) -> None:
        await note(session, word)
        await both.wait()
        if word == "bad":
            raise ValueError(word)

    async with a_work_with(settings, job) as work:
        good = await a_job(engine, name=NAME, args={"word": "good"})
        bad = await a_job(engine, name=NAME, args={"word": "bad"})
        runs = await claimed(work, good, bad)

        await asyncio.gather(*(start(work, run) for run in runs))

        assert (await state(engine, good), await state(engine, bad)) == ("succeeded", "queued")
        assert await notes(engine) == ["good"]
