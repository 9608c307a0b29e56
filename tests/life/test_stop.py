"""SIGTERM, SIGINT, and a stop from within: nothing is lost, nothing is blamed, nothing is left."""

from __future__ import annotations

import asyncio
import signal
import time
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.databases import KEPT
from tests.life import jobs_for_tests as jobs
from tests.processes import worker_process, workers
from tests.proxy import postgres_proxy
from tests.support import a_job, a_locked_row, a_worker, attempts, hints, payload_ids, row, state, until
from worker.core.context import JobContext
from worker.core.registry import Registry
from worker.flow import pump
from worker.flow.flush import Flusher
from worker.flow.job import JobFunction
from worker.observe import events
from worker.observe.events import Event, WorkerStopped, WorkerStopping
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


@pytest.fixture(autouse=True)
async def _effects(engine: AsyncEngine) -> None:
    await jobs.make_effects(engine)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return tmp_path / "lines"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_claims_and_lets_what_runs_end(
    number: signal.Signals, engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    (running,) = await jobs.enqueue_all(sessions, jobs.slow.call("first", 0.7))
    async with worker_process(settings, engine, lines=lines, worker_grace=10) as worker:
        await until(lambda: "began first" in jobs.lines(lines), "the first job begins")

        worker.send(number)
        await until(lambda: worker.said("stopping"), "the worker stops")
        (later,) = await jobs.enqueue_all(sessions, jobs.note.call("later"))

        assert await worker.ended() == 0
    assert await state(engine, running) == "succeeded"
    assert await state(engine, later) == "queued"
    assert (await row(engine, later)).attempt == 0
    assert await jobs.effects(engine) == ["first"]


async def test_what_outlasts_the_grace_is_cancelled_and_given_back_without_a_failure(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    (job,) = await jobs.enqueue_all(sessions, jobs.slow.call("long", 60))
    async with worker_process(settings, engine, lines=lines, worker_grace=0.3) as worker:
        await until(lambda: "began long" in jobs.lines(lines), "the job begins")

        worker.send(signal.SIGTERM)

        assert await worker.ended() == 0
    found = await row(engine, job)
    assert (found.state, found.failures, found.crashes) == ("queued", 0, 0)
    assert [attempt.ending for attempt in await attempts(engine, job)] == ["released"]
    assert await workers(engine) == []


async def test_a_second_signal_ends_the_grace(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    (job,) = await jobs.enqueue_all(sessions, jobs.slow.call("long", 60))
    async with worker_process(settings, engine, lines=lines, worker_grace=60) as worker:
        await until(lambda: "began long" in jobs.lines(lines), "the job begins")

        worker.send(signal.SIGINT)
        await until(lambda: worker.said("stopping"), "the worker stops")
        worker.send(signal.SIGINT)

        assert await worker.ended() == 0
    found = await row(engine, job)
    assert (found.state, found.failures, found.crashes) == ("queued", 0, 0)


async def test_a_job_that_ignores_its_cancellation_holds_up_no_stop(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    (job,) = await jobs.enqueue_all(sessions, jobs.stubborn.call("stubborn", 60))
    async with worker_process(settings, engine, lines=lines, worker_grace=0.3) as worker:
        await until(lambda: "began stubborn" in jobs.lines(lines), "the job begins")

        worker.send(signal.SIGTERM)

        assert await worker.ended(30) == 0  # long before the job does
    found = await row(engine, job)
    assert (found.state, found.failures, found.crashes) == ("queued", 0, 0)
    assert "ignored stubborn" in jobs.lines(lines)


async def test_a_blocked_loop_does_not_hold_up_a_stop_and_its_jobs_are_given_back(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    blocking, beside = await jobs.enqueue_all(
        sessions, jobs.blocking.call("blocking", 60), jobs.slow.call("beside", 60)
    )
    async with worker_process(settings, engine, lines=lines, worker_grace=1, worker_lease=15) as worker:
        await until(lambda: "began blocking" in jobs.lines(lines), "the job blocks the loop")

        asked = time.monotonic()
        worker.send(signal.SIGTERM)

        assert await worker.ended(30) == 1
        assert 1.9 <= time.monotonic() - asked < 30  # long before the job does
    for job in (blocking, beside):
        found = await row(engine, job)
        assert (found.state, found.failures, found.crashes) == ("queued", 0, 0)
    assert await workers(engine) == []


async def test_a_worker_that_was_told_to_stop_while_postgresql_is_silent_ends(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    async with (
        postgres_proxy(str(settings.database.url)) as (proxy, url),
        worker_process(settings, engine, database_url=url, worker_grace=0.5) as worker,
    ):
        await jobs.enqueue_all(sessions, jobs.note.call("before"))
        await until(lambda: jobs.effects(engine), "a job has run")

        proxy.silence()
        worker.send(signal.SIGTERM)

        assert await worker.ended(45) in (0, 1)


async def test_after_a_stop_nothing_of_the_worker_is_left(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, redis: ArqRedis
) -> None:
    async with a_worker(settings, jobs.registry()) as worker:
        await jobs.enqueue_all(sessions, *(jobs.note.call(str(n)) for n in range(20)))
        await jobs.enqueue_all(sessions, *(jobs.nothing.call() for _ in range(20)))
        await until(lambda: _all_have(engine, "succeeded"), "all jobs have run")
        worker.stop()

    await until(lambda: _nobody_else_is_connected(engine), "the worker's connections are gone")
    assert await workers(engine) == []
    assert await hints(redis) == {}
    assert await payload_ids(redis) == set()


async def test_a_job_cut_short_by_a_stop_has_its_hint_in_redis_again(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "_AFTER_CANCEL", timedelta(seconds=20))  # else the heartbeat gives it back, hintless
    settings = _with_grace(settings, 0.1)
    (job,) = await jobs.enqueue_all(sessions, jobs.slow.call("long", 60))

    async with a_worker(settings, jobs.registry()):
        await until(lambda: _is(engine, job, "running"), "the job runs")

    assert await state(engine, job) == "queued"
    assert set(await hints(redis)) == await payload_ids(redis) == {str(job)}


async def test_a_success_that_cannot_be_stored_does_not_hold_up_a_stop(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def quick(ctx: JobContext) -> int:
        began.set()
        await may_return.wait()
        return 1

    began, may_return, drains = asyncio.Event(), asyncio.Event(), asyncio.Event()
    drain = Flusher.drain

    async def noted(flusher: Flusher) -> None:
        drains.set()
        await drain(flusher)

    monkeypatch.setattr(Flusher, "drain", noted)
    monkeypatch.setattr(pump, "_MOST_UNSTORED", 1)
    told: list[Event] = []
    registry = Registry()
    registry.register(JobFunction(quick, name="quick"))
    stop = events.listen(told.append)
    async with a_worker(settings, registry) as worker:
        job_id = await a_job(engine, name="quick")
        await began.wait()
        async with a_locked_row(engine, job_id):
            may_return.set()
            await drains.wait()

            worker.stop()
            await until(lambda: [one for one in told if isinstance(one, WorkerStopped)], "the worker stops")
            assert await state(engine, job_id) == "running"  # nobody may write it: it is left to a rescue
    stop()
    async with engine.begin() as connection:
        await connection.execute(text("DELETE FROM exarq.job"))


async def test_the_stop_says_how_many_jobs_run_and_how_long_they_may(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    said: list[WorkerStopping] = []
    may_end = asyncio.Event()

    async def waits(ctx: JobContext) -> None:
        await may_end.wait()

    def note(event: Event) -> None:
        if isinstance(event, WorkerStopping):
            said.append(event)
            may_end.set()

    registry = Registry()
    function = JobFunction(waits, name="tests.waits")
    registry.register(function)
    deaf = events.listen(note)
    (job,) = await jobs.enqueue_all(sessions, function.call())
    async with a_worker(_with_grace(settings, 60), registry):
        await until(lambda: _is(engine, job, "running"), "the job runs")
    deaf()

    (stopping,) = said
    assert stopping.running == 1
    assert stopping.grace == pytest.approx(60, abs=10)
    assert await state(engine, job) == "succeeded"


def _with_grace(settings: Settings, seconds: float) -> Settings:
    worker = settings.worker.model_copy(update={"grace": timedelta(seconds=seconds)})
    return settings.model_copy(update={"worker": worker})


async def _is(engine: AsyncEngine, job: object, wanted: str) -> bool:
    return await state(engine, job) == wanted  # type: ignore[arg-type]


async def _all_have(engine: AsyncEngine, wanted: str) -> bool:
    return set(await jobs.states(engine)) == {wanted}


async def _nobody_else_is_connected(engine: AsyncEngine) -> bool:
    async with engine.connect() as connection:
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            f" AND application_name <> '{KEPT}'"
        )
        return not (await connection.execute(text(query))).scalar_one()


async def test_a_task_on_the_side_that_exits_ends_neither_the_worker_nor_its_job(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    async with worker_process(settings, engine) as worker:
        first, second = await jobs.enqueue_all(sessions, jobs.exiting.call("one"), jobs.note.call("two"))

        await until(lambda: _all_succeeded(engine, [first, second]), "both succeed")

        assert not worker.is_over
        assert worker.said("step failed")
    assert sorted(await jobs.effects(engine)) == ["one", "two"]


async def _all_succeeded(engine: AsyncEngine, ids: list[UUID]) -> bool:
    return {await state(engine, job_id) for job_id in ids} == {"succeeded"}


async def test_a_thread_that_a_job_has_left_does_not_hold_up_the_end_of_the_process(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    (job,) = await jobs.enqueue_all(sessions, jobs.in_a_thread.call(300))
    async with worker_process(settings, engine, lines=lines, worker_grace=0.3) as worker:
        await until(lambda: "began in a thread" in jobs.lines(lines), "the job begins")

        worker.send(signal.SIGTERM)

        assert await worker.ended() == 0
        assert worker.said("threads of jobs")
    assert ((await row(engine, job)).state, (await row(engine, job)).failures) == ("queued", 0)
