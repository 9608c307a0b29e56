"""The beat: who lives, who holds what, and what becomes of a process whose loop or database stands still."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from tests.db.conftest import statements_of
from tests.life import jobs_for_tests as jobs
from tests.processes import worker_process, workers
from tests.proxy import postgres_proxy
from tests.support import a_job, a_locked_row, a_work, a_worker, attempts, heard, row, state, until
from worker.core.pace import Pace
from worker.db import transitions
from worker.db import workers as worker_rows
from worker.flow.holdings import Run
from worker.flow.work import Work
from worker.observe.events import (
    ClaimForgotten,
    RunCancelled,
    SelfFenced,
    StepFailed,
    WorkerRenewed,
    WorkerRescued,
)
from worker.process import Worker
from worker.resources import open_processor_engine
from worker.settings import Settings
from worker.upkeep import heartbeat as module
from worker.upkeep.heartbeat import Compared, Heartbeat, beat

Sessions = async_sessionmaker[AsyncSession]

pytestmark = [pytest.mark.timeout(300), pytest.mark.hasty]  # processes start slowly on a loaded machine


@pytest.fixture(autouse=True)
async def _effects(engine: AsyncEngine) -> None:
    await jobs.make_effects(engine)


# ── one beat ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_beat_counts_on(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings) as work:
        before = await _beat_of(engine, work.identity.id)

        compared = await _beat(work)

        assert await _beat_of(engine, work.identity.id) == before + 1
        assert compared == Compared(alive=True, lost=[], flagged=[])


async def test_a_beat_that_finds_nothing_amiss_is_one_statement(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings) as work:
        with statements_of(work.processor) as sent:
            await _beat(work)

    assert len(sent) == 1


async def test_a_row_whose_claim_was_never_answered_is_given_back(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings) as work, heard() as events:
        job = await a_job(engine, state="running", worker_id=work.identity.id)

        await _beat(work)

    found = await row(engine, job)
    assert (found.state, found.failures, found.crashes) == ("queued", 0, 0)
    assert [event.jobs for event in events if isinstance(event, ClaimForgotten)] == [(job,)]


async def test_a_forgotten_row_that_somebody_holds_does_not_keep_the_beat_from_the_others(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work(settings) as work:
        forgotten = await a_job(engine, state="running", worker_id=work.identity.id)
        (run,) = await _claim(work, await a_job(engine))
        async with engine.begin() as connection:
            await connection.run_sync(transitions.request_cancel, run.claimed.held.job_id, "asked")

        async with a_locked_row(engine, forgotten):
            compared = await _beat(work)
        await _beat(work)

        assert compared == Compared(alive=True, lost=[], flagged=[run])
        assert (await row(engine, forgotten)).state == "queued"
        async with engine.begin() as connection:
            await transitions.release_many(connection, [run.claimed.held], "the test ends")


async def test_a_row_whose_claim_is_on_its_way_is_left_alone(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings) as work:
        token = uuid4()
        work.holdings.claiming(token)
        job = await a_job(engine, state="running", worker_id=work.identity.id, token=token)

        await _beat(work)

        assert await state(engine, job) == "running"
        work.holdings.forget(token)
        await _beat(work)
    assert await state(engine, job) == "queued"


async def test_a_job_claimed_while_the_rows_are_read_is_neither_lost_nor_given_back(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_work(settings) as work:
        early, late = await a_job(engine), await a_job(engine)
        real = worker_rows.beat

        async def claim_before_and_after(connection: AsyncConnection, worker_id: UUID, *, looks: bool) -> Any:
            await _claim(work, early)
            found = await real(connection, worker_id, looks=looks)
            await _claim(work, late)
            return found

        monkeypatch.setattr(worker_rows, "beat", claim_before_and_after)
        compared = await _beat(work)
        monkeypatch.undo()

        assert (compared.lost, compared.flagged) == ([], [])
        assert [await state(engine, job) for job in (early, late)] == ["running", "running"]
        await _let_all_go(work)


async def test_a_run_whose_row_is_somebody_elses_is_found(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings) as work:
        job, kept = await a_job(engine), await a_job(engine)
        await _claim(work, job)
        await _claim(work, kept)
        await _execute(
            engine, "UPDATE exarq.job SET token = gen_random_uuid(), worker_id = NULL WHERE id = :id", id=job
        )

        compared = await _beat(work)

        assert [run.claimed.held.job_id for run in compared.lost] == [job]
        await _execute(engine, "UPDATE exarq.job SET state = 'queued' WHERE id = :id", id=job)
        await _let_all_go(work)


# ── in a worker ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_run_is_cancelled_as_soon_as_somebody_asks(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    async with a_worker(settings, jobs.registry()):
        (job,) = await jobs.enqueue_all(sessions, jobs.slow.call("long", 60))
        await until(lambda: _is(engine, job, "running"), "the job runs")

        await _execute(engine, "UPDATE exarq.job SET cancel_requested = true WHERE id = :id", id=job)

        await until(lambda: _is(engine, job, "cancelled"), "the run ends")
    assert [one.ending for one in await attempts(engine, job)] == ["cancelled"]
    assert await jobs.effects(engine) == []


async def test_a_run_ends_at_once_when_its_job_was_given_to_somebody_else(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    async with heard() as events, a_worker(settings, jobs.registry()):
        (job,) = await jobs.enqueue_all(sessions, jobs.slow.call("long", 60))
        await until(lambda: _is(engine, job, "running"), "the job runs")

        await _execute(engine, "UPDATE exarq.job SET state = 'failed', token = NULL WHERE id = :id", id=job)

        await until(lambda: any(isinstance(event, RunCancelled) for event in events), "the run is cancelled")
    assert await state(engine, job) == "failed"
    assert await jobs.effects(engine) == []


async def test_a_worker_whose_row_is_gone_goes_on_under_a_new_id(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    async with heard() as events, a_worker(settings, jobs.registry()):
        (before,) = await until(lambda: workers(engine), "the worker beats")
        (job,) = await jobs.enqueue_all(sessions, jobs.holding.call("work", 60))
        await until(lambda: _is(engine, job, "running"), "the job runs")

        await _execute(engine, "DELETE FROM exarq.worker")

        await until(lambda: _is(engine, job, "succeeded"), "the job runs again")
        (after,) = await until(lambda: workers(engine), "the worker beats under its new id")
        assert after != before
        names = await _application_names(engine)
    found = await row(engine, job)
    assert (found.attempt, found.failures, found.crashes, found.worker_id) == (2, 0, 0, after)
    assert await jobs.effects(engine) == ["work 2"]
    assert [(event.old, event.new) for event in events if isinstance(event, WorkerRenewed)] == [(before, after)]
    assert f"exarq {after}" in names


async def test_a_claim_that_was_on_its_way_when_the_id_changed_is_given_back_without_blame(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    unhurried = settings.model_copy(
        update={"worker": settings.worker.model_copy(update={"lease": timedelta(seconds=30)})}
    )
    async with heard() as events, a_worker(unhurried, jobs.registry()):  # no rescue comes before the beat
        (former,) = await until(lambda: workers(engine), "the worker beats")
        await _execute(engine, "DELETE FROM exarq.worker")
        await until(lambda: any(isinstance(event, WorkerRenewed) for event in events), "the worker has a new id")

        job = await a_job(engine, name="tests.nothing", state="running", worker_id=former)

        await until(lambda: _is(engine, job, "succeeded"), "the job runs")
    assert (await row(engine, job)).crashes == 0
    assert not [event for event in events if isinstance(event, WorkerRescued)]


async def test_without_a_beat_for_a_lease_the_runs_are_cancelled_and_work_goes_on_afterwards(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(jobs.LINES, str(tmp_path / "lines"))
    async with postgres_proxy(str(settings.database.url)) as (proxy, url):
        through = settings.model_copy(update={"database": settings.database.model_copy(update={"url": url})})
        async with heard() as events, a_worker(through, jobs.registry()):
            (job,) = await jobs.enqueue_all(sessions, jobs.holding.call("work", 60))
            await until(lambda: jobs.lines(tmp_path / "lines"), "the job has written")

            proxy.refuse()
            await until(lambda: any(isinstance(event, RunCancelled) for event in events), "the run is cancelled")
            proxy.restore()

            await until(lambda: _is(engine, job, "succeeded"), "the job runs again")
    assert len([event for event in events if isinstance(event, SelfFenced)]) == 1
    found = await row(engine, job)
    assert (found.failures, found.crashes) == (0, 0)
    assert await jobs.effects(engine) == [f"work {found.attempt}"]


def beats_that_take(
    monkeypatch: pytest.MonkeyPatch, *, look: float, bare: float, error: Exception | None = None
) -> list[bool]:
    """By the clock of its looks each beat takes so many seconds, and one that looks ends in this error; who looked."""
    looked: list[bool] = []
    clock = [0.0]
    real = worker_rows.beat

    async def taking(connection: AsyncConnection, worker_id: UUID, *, looks: bool) -> Any:
        looked.append(looks)
        clock[0] += look if looks else bare
        if looks and error is not None:
            raise error
        return await real(connection, worker_id, looks=looks)

    monkeypatch.setattr(worker_rows, "beat", taking)
    monkeypatch.setattr(module, "Pace", partial(Pace, clock=lambda: clock[0]))
    return looked


async def test_after_a_look_that_took_long_the_worker_beats_without_until_it_has_rested(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = beats_that_take(monkeypatch, look=0.01, bare=0.06)
    async with a_worker(settings, jobs.registry()):
        await until(lambda: len(looked) >= 6, "it beats")

    assert looked[:6] == [True, False, False] * 2


async def test_a_look_that_fails_costs_no_beat_and_rests_as_well(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = beats_that_take(monkeypatch, look=0.01, bare=0.04, error=TimeoutError())
    async with heard() as events, a_worker(settings, jobs.registry()):
        await until(lambda: len(looked) >= 10, "it beats")

    # At the second failure in a row it took 0.05 s with the beat after it: it rests for twelve beats of 0.04 s.
    assert looked[:10] == [True, False, True, *[False] * 7]
    assert not any(isinstance(event, SelfFenced) for event in events)


async def test_while_postgresql_is_away_the_process_still_says_that_it_lives(settings: Settings) -> None:
    lives: list[float] = []
    async with postgres_proxy(str(settings.database.url)) as (proxy, url):
        through = settings.model_copy(update={"database": settings.database.model_copy(update={"url": url})})
        worker = Worker(
            through, registry=jobs.registry(), handle_signals=False, beaten=lambda: lives.append(time.monotonic())
        )
        task = asyncio.create_task(worker.main())
        await until(lambda: lives, "it beats")

        async with heard() as events:
            proxy.refuse()
            await until(lambda: any(isinstance(event, SelfFenced) for event in events), "no beat for a lease")
            since = time.monotonic()
            await until(lambda: lives[-1] > since, "it says that it lives")
        proxy.restore()
        worker.stop()
        await task
        await worker.close()


async def test_a_job_that_blocks_the_loop_for_two_leases_keeps_it_and_is_reported(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    lines = tmp_path / "lines"
    # It is told of after a second, and each time that has doubled.
    (job,) = await jobs.enqueue_all(sessions, jobs.blocking.call("long", 6))
    async with worker_process(settings, engine, lines=lines) as worker:
        await until(lambda: jobs.lines(lines), "the job has begun")

        async with heard() as events, a_worker(settings, jobs.registry()):  # which would rescue it
            await until(lambda: _is(engine, job, "succeeded"), "the job ends")
        reports = worker.said("loop is blocked")

    assert (await row(engine, job)).attempt == 1
    assert not [event for event in events if isinstance(event, WorkerRescued)]
    # A loaded machine may hold up a loop for a moment by itself.
    assert {report["task"] for report in reports if report["seconds"] > 2.5} == {f"tests.blocking {job}"}


async def test_a_loop_that_is_blocked_beyond_the_limit_ends_the_process(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    lines = tmp_path / "lines"
    (job,) = await jobs.enqueue_all(sessions, jobs.blocking.call("stalled", 60))
    async with worker_process(settings, engine, lines=lines, worker_stall_limit=3) as worker:
        assert await worker.ended(45) == 70
        (*_, blocked) = worker.said("loop is blocked")

    async with a_worker(settings, jobs.registry()):
        await until(lambda: _is(engine, job, "succeeded"), "the job runs elsewhere")
    assert blocked["task"] == f"tests.blocking {job}"
    assert (await row(engine, job)).crashes == 1


# ── the thread ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_thread_goes_on_after_an_error_that_nobody_has_foreseen(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work(settings) as work, heard() as events:
        made: list[AsyncEngine] = []

        def make_engine() -> AsyncEngine:
            if not made:
                made.append(work.processor)
                raise RuntimeError("surprise")
            return open_processor_engine(settings, str(settings.database.url), work.identity, connections=1)

        async with _heartbeat(work, make_engine):
            await until(lambda: workers(engine), "the worker beats all the same")

    failed = [event for event in events if isinstance(event, StepFailed)]
    assert [one.error for one in failed if one.step == "heartbeat thread"] == ["RuntimeError: surprise"]


async def test_the_end_gives_back_what_still_runs_and_deletes_the_worker(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work(settings) as work:
        job = await a_job(engine)

        def make_engine() -> AsyncEngine:
            return open_processor_engine(settings, str(settings.database.url), work.identity, connections=1)

        async with _heartbeat(work, make_engine) as heartbeat:
            await until(lambda: workers(engine), "the worker beats")
            await _claim(work, job)
            given_back = await heartbeat.finish()

    assert given_back == 1
    assert await workers(engine) == []
    found = await row(engine, job)
    assert (found.state, found.failures, found.crashes) == ("queued", 0, 0)


async def test_the_end_does_not_wait_for_the_threads_of_jobs(engine: AsyncEngine, settings: Settings) -> None:
    loop, done = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(1))
    async with a_work(settings) as work:
        busy = loop.run_in_executor(None, done.wait)

        def make_engine() -> AsyncEngine:
            return open_processor_engine(settings, str(settings.database.url), work.identity, connections=1)

        async with _heartbeat(work, make_engine) as heartbeat:
            await until(lambda: workers(engine), "the worker beats")
            async with asyncio.timeout(30):
                await heartbeat.finish()

        done.set()
        await busy


async def test_a_stop_is_announced_in_the_workers_row(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings) as work:

        def make_engine() -> AsyncEngine:
            return open_processor_engine(settings, str(settings.database.url), work.identity, connections=1)

        async with _heartbeat(work, make_engine) as heartbeat:
            heartbeat.announce_stop()

            await until(lambda: _announced(engine), "the row says so")
            assert 0 < heartbeat.grace_left.total_seconds() < 60


@asynccontextmanager
async def _heartbeat(work: Work, make_engine: Any) -> AsyncIterator[Heartbeat]:
    unhurried = {"lease": timedelta(seconds=30), "grace": timedelta(seconds=60)}
    settings = work.settings.worker.model_copy(update=unhurried)
    heartbeat = Heartbeat(make_engine, work.identity, work.holdings, settings, owns_process=False)
    heartbeat.start()
    try:
        yield heartbeat
    finally:
        await heartbeat.finish()


async def _beat(work: Work) -> Compared:
    async with work.processor.connect() as connection:
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        return await beat(autocommit, work.identity, work.holdings)


async def _claim(work: Work, job: UUID) -> list[Run]:
    token = uuid4()
    work.holdings.claiming(token)
    async with work.processor.begin() as connection:
        claimed = await transitions.claim(
            connection, [job], token=token, worker_id=work.identity.id, may_take_suspect=True
        )
    return work.holdings.claimed(token, claimed)


async def _let_all_go(work: Work) -> None:
    for held in work.holdings.runs():
        work.holdings.let_go(held)
    await _beat(work)


async def _beat_of(engine: AsyncEngine, worker_id: UUID) -> int:
    async with engine.connect() as connection:
        query = text("SELECT beat FROM exarq.worker WHERE id = :id")
        return int((await connection.execute(query, {"id": worker_id})).scalar_one())


async def _announced(engine: AsyncEngine) -> bool:
    async with engine.connect() as connection:
        query = text("SELECT count(*) FROM exarq.worker WHERE stopping_at IS NOT NULL")
        return bool((await connection.execute(query)).scalar())


async def _application_names(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as connection:
        query = text("SELECT application_name FROM pg_stat_activity WHERE datname = current_database()")
        return set((await connection.execute(query)).scalars())


async def _execute(engine: AsyncEngine, statement: str, **parameters: Any) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(statement), parameters)


async def _is(engine: AsyncEngine, job: UUID, wanted: str) -> bool:
    return await state(engine, job) == wanted
