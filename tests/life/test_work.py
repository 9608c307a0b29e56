"""Whole journeys: sharing, limits, times, and processes that die."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.life import jobs_for_tests as jobs
from tests.processes import worker_process, workers
from tests.support import a_job, a_worker, hints, payload_ids, row, run_all, state, until
from worker.core.context import JobContext
from worker.core.registry import Registry
from worker.flow import claim, pump
from worker.flow.claim import Claimer
from worker.flow.holdings import Run
from worker.flow.job import JobFunction
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


@pytest.fixture(autouse=True)
async def _effects(engine: AsyncEngine) -> None:
    await jobs.make_effects(engine)


async def test_two_workers_share_the_jobs_and_each_runs_once(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    words = sorted(f"{n:03}" for n in range(100))
    async with a_worker(settings, jobs.registry()), a_worker(settings, jobs.registry()):
        await until(lambda: _holds(workers(engine), lambda found: len(found) == 2), "both beat")
        await jobs.enqueue_all(sessions, *(jobs.slow.call(word, 0.02) for word in words))
        await until(lambda: _holds(jobs.states(engine), lambda found: found == {"succeeded": 100}), "all are done")

    shares = {worker for (worker,) in await jobs.rows(engine, "worker_id")}
    assert await jobs.effects(engine) == words
    assert len(shares) == 2
    assert {attempt for (attempt,) in await jobs.rows(engine, "attempt")} == {1}


@pytest.mark.hasty
async def test_each_of_500_jobs_has_one_effect_whatever_is_killed(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, redis: ArqRedis
) -> None:
    words = sorted(f"{n:03}" for n in range(500))
    dice = random.Random(7)
    await jobs.enqueue_all(sessions, *(jobs.slow.call(word, 0.05) for word in words))
    async with worker_process(settings, engine, jobs_max_crashes=50, worker_grace=5):
        for _ in range(3):
            async with worker_process(settings, engine, registered=False, jobs_max_crashes=50) as victim:
                before = await _done(engine)
                goal = min(before + dice.randint(20, 80), 480)
                await until(lambda goal=goal: _holds(_done(engine), lambda n: n >= goal), "some are done", 60)  # type: ignore[misc]
                victim.send(signal.SIGKILL)
        await until(lambda: _holds(_done(engine), lambda n: n == 500), "all are done", 120)
        # What a victim had claimed in Redis shows again after a lease, and needs a worker that drops it.
        await until(lambda: _holds(hints(redis), lambda found: not found), "no hint is left")

    assert await jobs.effects(engine) == words
    assert await jobs.states(engine) == {"succeeded": 500}
    assert await payload_ids(redis) == set()


async def test_burst_ends_when_nothing_is_due_and_nothing_runs(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    await jobs.enqueue_all(sessions, *(jobs.slow.call(f"{n}", 0.05) for n in range(12)))
    later = await a_job(engine, name="tests.nothing", run_at=await _in(engine, 60))

    await run_all(settings, jobs.registry())

    assert await _done(engine) == 12
    assert await state(engine, later) == "queued"


async def test_burst_takes_what_comes_due_while_others_run(engine: AsyncEngine, settings: Settings) -> None:
    came = asyncio.Event()

    async def waits(ctx: JobContext) -> None:
        async with asyncio.timeout(30):
            await came.wait()

    async def comes(ctx: JobContext) -> None:
        came.set()

    registry = Registry()
    for function in (waits, comes):
        registry.register(JobFunction(function, name=function.__name__))
    ids = [await a_job(engine, name="waits"), await a_job(engine, name="comes", run_at=await _in(engine, 1))]

    await run_all(settings, registry)

    found = [await row(engine, job_id) for job_id in ids]
    assert [(one.state, one.attempt) for one in found] == [("succeeded", 1), ("succeeded", 1)]


async def test_jobs_that_nobody_knows_keep_no_others_waiting(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    # Overdue for so long that each is put off for a minute: none comes back while the others are dealt with.
    overdue = {"first_due_at": await _in(engine, -240), "run_at": await _in(engine, -240)}
    unknown = [await a_job(engine, name="tests.unheard_of", **overdue) for _ in range(30)]

    async with a_worker(settings, jobs.registry()):
        await jobs.enqueue_all(sessions, jobs.note.call("known"))
        await until(lambda: _holds(jobs.effects(engine), lambda found: found == ["known"]), "the known one runs")
        await until(lambda: _none_is_due(engine), "the others were put off")

    found = [await row(engine, job) for job in unknown]
    assert {(one.state, one.failures, one.crashes) for one in found} == {("queued", 0, 0)}


async def test_no_more_jobs_run_than_may_and_no_claim_takes_more_than_there_is_room(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most = 0, 0
    claims: list[tuple[int, int]] = []
    real = Claimer.claim

    async def measured(self: Claimer, room: int) -> list[Run]:
        runs = await real(self, room)
        claims.append((room, len(runs)))
        return runs

    async def counted(ctx: JobContext) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1

    registry = Registry()
    function = JobFunction(counted, name="tests.counted")
    registry.register(function)
    monkeypatch.setattr(Claimer, "claim", measured)
    await jobs.enqueue_all(sessions, *(function.call() for _ in range(40)))
    await run_all(settings, registry)

    assert await _done(engine) == 40
    assert most == settings.worker.concurrency
    assert all(0 < room <= settings.worker.concurrency and taken <= room for room, taken in claims)


async def test_a_scheduled_job_runs_when_it_is_due(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "LONGEST_WAIT", timedelta(minutes=2))  # so that nothing but the due time ends the wait
    patient = settings.model_copy(update={"redis": settings.redis.model_copy(update={"timeout": timedelta(minutes=4)})})
    async with a_worker(patient, jobs.registry()):
        await until(lambda: workers(engine), "the worker beats")
        async with sessions.begin() as session:
            handle = await jobs.note.options(delay=1).enqueue(session, "later")
        await until(lambda: _holds(state(engine, handle.id), lambda found: found == "succeeded"), "it runs")

    found = await row(engine, handle.id)
    late = (found.started_at - found.run_at).total_seconds()
    assert 0 <= late < 15


async def test_a_retry_runs_when_it_is_due(engine: AsyncEngine, sessions: Sessions, settings: Settings) -> None:
    tries: list[float] = []

    async def flaky(ctx: JobContext) -> None:
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise ValueError("not yet")

    registry = Registry()
    function = JobFunction(flaky, name="tests.flaky")
    registry.register(function)
    async with a_worker(settings, registry):
        (job,) = await jobs.enqueue_all(sessions, function.call())
        await until(lambda: _holds(state(engine, job), lambda found: found == "succeeded"), "it succeeds")

    found = await row(engine, job)
    assert (len(tries), found.attempt, found.failures) == (4, 4, 3)


async def test_a_wait_that_fails_is_told_and_does_not_spin(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits, began = 0, time.monotonic()

    async def fail(self: Claimer) -> None:
        nonlocal waits
        waits += 1
        raise RuntimeError("a fault in the wait")

    monkeypatch.setattr(Claimer, "wait", fail)
    async with a_worker(settings, jobs.registry()):
        await jobs.enqueue_all(sessions, jobs.note.call("all the same"))
        await until(lambda: _holds(jobs.effects(engine), bool), "the job runs")

    assert waits <= 1 + (time.monotonic() - began) / pump._BACK_OFF.total_seconds()


async def _done(engine: AsyncEngine) -> int:
    return (await jobs.states(engine)).get("succeeded", 0)


async def _holds(found: Awaitable[Any], wanted: Callable[[Any], bool]) -> bool:
    return bool(wanted(await found))


async def _in(engine: AsyncEngine, seconds: float) -> Any:
    async with engine.connect() as connection:
        query = text("SELECT clock_timestamp() + make_interval(secs => :seconds)")
        return (await connection.execute(query, {"seconds": seconds})).scalar_one()


async def _none_is_due(engine: AsyncEngine) -> bool:
    async with engine.connect() as connection:
        query = "SELECT count(*) FROM exarq.job WHERE state = 'running' OR state = 'queued' AND run_at <= now()"
        return not (await connection.execute(text(query))).scalar()
