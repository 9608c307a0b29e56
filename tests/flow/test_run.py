"""Run: every way an attempt can end, and what stands in the rows afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.flow.helpers import NAME, a_work_with, claimed, note, notes, run_new, start
from tests.proxy import postgres_proxy
from tests.support import a_job, attempts, heard, hints, row, state, until
from worker.core.context import JobContext
from worker.core.errors import UnknownJob
from worker.core.outcome import Cancel, Fail, Retry, Snooze
from worker.flow.holdings import Because
from worker.observe.events import AttemptEnded, RunCancelled, StaleWriteRefused, StepFailed
from worker.settings import Settings

pytestmark = pytest.mark.usefixtures("note_table")


# ── returned ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_jobs_writes_and_its_result_become_visible_together(engine: AsyncEngine, settings: Settings) -> None:
    seen: list[list[str]] = []

    async def job(session: AsyncSession) -> dict[str, int]:
        await note(session, "done")
        await session.commit()
        seen.append(await notes(engine))
        return {"n": 1}

    async with a_work_with(settings, job) as work, heard() as told:
        job_id, run = await run_new(work, engine)

        found = await row(engine, job_id)
        assert seen == [[]]
        assert (found.state, found.result, found.failures, found.attempt) == ("succeeded", {"n": 1}, 0, 1)
        assert found.token == run.claimed.held.token
        assert await notes(engine) == ["done"]
        assert await attempts(engine, job_id) == []
        assert work.holdings.runs() == {}
        assert [(one.outcome, one.attempt) for one in told if isinstance(one, AttemptEnded)] == [("succeeded", 1)]


async def test_a_job_that_leaves_the_session_alone_takes_no_connection(engine: AsyncEngine, settings: Settings) -> None:
    async def job(ctx: JobContext) -> int:
        return ctx.attempt

    async with a_work_with(settings, job) as work:
        made: list[Any] = []
        real = work.sessions
        work.sessions = lambda **options: made.append(options) or real(**options)  # type: ignore[assignment, func-returns-value]

        job_id, _ = await run_new(work, engine)

        assert (await row(engine, job_id)).result == 1
        assert made == []
        assert work.jobs_engine.pool.status().count("Connections in pool: 0") == 1


async def test_a_session_that_sends_nothing_takes_no_connection_either(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> None:
        await session.commit()

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)

        assert await state(engine, job_id) == "succeeded"
        assert "Connections in pool: 0" in work.jobs_engine.pool.status()


# ── raised ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _raising(error: Callable[[], BaseException]) -> Any:
    async def job(session: AsyncSession) -> None:
        await note(session, "lost")
        await session.commit()
        raise error()

    return job


@pytest.mark.parametrize(
    ("error", "columns", "stands"),
    [
        (lambda: ValueError("no"), {}, ("queued", 1, "retried", "ValueError: no")),
        (lambda: ValueError("no"), {"failures": 9, "attempt": 9}, ("failed", 10, "failed", "ValueError: no")),
        (lambda: Retry(), {}, ("queued", 1, "retried", "asked for another attempt")),
        (lambda: Retry(), {"failures": 9, "attempt": 9}, ("failed", 10, "failed", "asked for another attempt")),
        (lambda: Snooze(60), {}, ("queued", 0, "snoozed", None)),
        (lambda: Snooze(60), {"failures": 9, "attempt": 9}, ("queued", 9, "snoozed", None)),
        (lambda: Cancel("unwanted"), {}, ("cancelled", 0, "cancelled", "unwanted")),
        (lambda: Fail("hopeless"), {}, ("failed", 1, "failed", "hopeless")),
        (lambda: SystemExit(3), {}, ("queued", 1, "retried", "SystemExit: 3")),
        (lambda: asyncio.CancelledError(), {}, ("queued", 1, "retried", "CancelledError")),
        (lambda: ValueError("a\0b\ud800"), {}, ("queued", 1, "retried", "ValueError: a\\x00b\\ud800")),
        (lambda: UnknownJob("other", []), {}, ("queued", 1, "retried", "no job named 'other'")),
        (lambda: ValueError(), {"cancel_requested": True}, ("cancelled", 1, "retried", "ValueError")),
    ],
)
async def test_what_a_job_raises_decides_where_it_goes_and_its_writes_are_gone(
    engine: AsyncEngine,
    settings: Settings,
    error: Callable[[], BaseException],
    columns: dict[str, Any],
    stands: tuple[str, int, str, str | None],
) -> None:
    where, failures, ending, message = stands

    async with a_work_with(settings, _raising(error)) as work:
        job_id, run = await run_new(work, engine, **columns)

        found, (attempt,) = await row(engine, job_id), await attempts(engine, job_id)
        assert (found.state, found.failures) == (where, failures)
        assert (attempt.token, attempt.number, attempt.ending) == (run.claimed.held.token, found.attempt, ending)
        assert attempt.worker_id == work.identity.id
        assert attempt.error == message if message is None else message in attempt.error
        assert (found.finished_at is None) == (where == "queued")
        assert await notes(engine) == []
        assert work.holdings.runs() == {}


@pytest.mark.parametrize("error", [Retry(delay=20), Snooze(20)])
async def test_a_job_may_say_when_it_runs_again_and_its_hint_says_so_too(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings, error: Exception
) -> None:
    async def job(ctx: JobContext) -> None:
        raise error

    async with a_work_with(settings, job) as work:
        began = datetime.now(UTC)
        job_id, _ = await run_new(work, engine)
        await work.publisher.flush()

        found, took = await row(engine, job_id), datetime.now(UTC) - began
        assert timedelta(seconds=20) <= found.run_at - began <= timedelta(seconds=20) + took
        late = (await hints(redis))[str(job_id)] / 1000 - found.run_at.timestamp()
        assert -0.01 <= late <= took.total_seconds()


async def test_a_job_that_runs_again_much_later_is_left_to_reconcile(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    async def job(ctx: JobContext) -> None:
        raise Snooze(3600)

    async with a_work_with(settings, job) as work:
        await run_new(work, engine)
        await work.publisher.flush()

        assert await hints(redis) == {}


async def test_arguments_that_no_longer_fit_are_a_failure_of_the_attempt(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(ctx: JobContext, invoice: int) -> None:
        raise AssertionError("never called")

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine, args={"bill": 7})

        (attempt,) = await attempts(engine, job_id)
        assert "unknown argument 'bill'" in attempt.error
        assert (await row(engine, job_id)).failures == 1


async def test_a_result_that_cannot_be_kept_fails_the_attempt_and_its_writes(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> str:
        await note(session, "lost")
        return "a\0b"

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)

        (attempt,) = await attempts(engine, job_id)
        assert "NUL" in attempt.error
        assert await notes(engine) == []


async def test_a_database_that_was_away_at_the_first_statement_is_no_failure_of_the_job(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "never")

    async with postgres_proxy(str(settings.database.url)) as (proxy, near):
        behind = settings.model_copy(update={"database": settings.database.model_copy(update={"url": near})})
        async with a_work_with(behind, job) as work:
            job_id = await a_job(engine, name=NAME)
            (run,) = await claimed(work, job_id)

            proxy.refuse()
            task = start(work, run)
            async with heard() as told:
                await until(lambda: [one for one in told if isinstance(one, StepFailed)], "the outcome finds nobody")
            proxy.restore()
            await task

    found = await row(engine, job_id)
    (attempt,) = await attempts(engine, job_id)
    assert (found.state, found.failures) == ("queued", 0)
    assert "PostgreSQL does not answer" in attempt.error


@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_contention_is_retried_without_counting_up_to_a_limit(
    engine: AsyncEngine, settings: Settings, code: str
) -> None:
    async def job(session: AsyncSession) -> None:
        await session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'contended' USING ERRCODE = '{code}'; END $$"))

    async with a_work_with(settings, job) as work:
        first, _ = await run_new(work, engine)
        after_snoozes, _ = await run_new(work, engine, attempt=50, contended=19)
        last, _ = await run_new(work, engine, attempt=20, contended=20)

        for job_id, times in ((first, 1), (after_snoozes, 20)):
            found = await row(engine, job_id)
            assert (found.state, found.failures, found.contended) == ("queued", 0, times)
        found = await row(engine, last)
        assert (found.failures, found.contended) == (1, 20)


async def test_a_function_nobody_here_knows_is_left_to_others_for_longer_and_longer_and_at_last_failed(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(ctx: JobContext) -> None: ...

    now = datetime.now(UTC)
    async with a_work_with(settings, job) as work:
        waits = []
        for overdue in (timedelta(seconds=1), timedelta(minutes=4), timedelta(hours=23)):
            job_id = await a_job(engine, name="tests.new", first_due_at=now - overdue)
            (run,) = await claimed(work, job_id)
            await start(work, run)
            found, (attempt,) = await row(engine, job_id), await attempts(engine, job_id)
            assert (found.state, found.failures, attempt.ending) == ("queued", 0, "released")
            waits.append((found.run_at - attempt.finished_at).total_seconds())
        too_old = await a_job(engine, name="tests.new", first_due_at=now - timedelta(hours=25))
        (run,) = await claimed(work, too_old)
        await start(work, run)

        assert [round(wait / 10) for wait in waits] == [0, 6, 30]
        assert await state(engine, too_old) == "failed"
        assert "no job named 'tests.new'" in (await row(engine, too_old)).error


# ── timeout and cancellation ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_timeout_ends_the_statement_on_the_server_and_replaces_the_connection(
    engine: AsyncEngine, settings: Settings
) -> None:
    pids: list[int] = []

    async def job(session: AsyncSession) -> None:
        pids.append((await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())
        await session.execute(text("SELECT pg_sleep(30)"))

    async with a_work_with(settings, job, timeout=1.5) as work:
        async with work.jobs_engine.connect():
            pass  # so that the job waits for no new connection
        job_id, _ = await run_new(work, engine)

        (attempt,) = await attempts(engine, job_id)
        assert "ran longer than its timeout of 1.5 s" in attempt.error
        assert (await row(engine, job_id)).failures == 1
        await until(lambda: _is_gone(engine, pids[0]), "the statement and its connection are gone")
        async with work.sessions() as session:
            assert (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one() != pids[0]


async def test_a_timeout_ends_also_what_has_not_heeded_an_earlier_cancellation(
    engine: AsyncEngine, settings: Settings
) -> None:
    began, went_on = asyncio.Event(), asyncio.Event()

    async def job(ctx: JobContext) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            went_on.set()
            await asyncio.Event().wait()

    async with a_work_with(settings, job, timeout=1) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        task = start(work, run)
        await began.wait()
        run.cancel(Because.STOPPING)
        await went_on.wait()
        await task

        (attempt,) = await attempts(engine, job_id)
        assert "ran longer than its timeout of 1 s" in attempt.error
        assert task.cancelling() == 0


async def _is_gone(engine: AsyncEngine, pid: int) -> bool:
    async with engine.connect() as connection:
        query = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
        return not (await connection.execute(query, {"pid": pid})).scalar_one()


async def test_a_jobs_own_timeout_error_is_not_taken_for_its_limit(engine: AsyncEngine, settings: Settings) -> None:
    async def job(ctx: JobContext) -> None:
        raise TimeoutError("of my own")

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)

        assert (await row(engine, job_id)).error == "TimeoutError: of my own"


@pytest.mark.parametrize(
    ("because", "where", "ending"),
    [
        (Because.CANCEL_REQUESTED, "cancelled", "cancelled"),
        (Because.STOPPING, "queued", "released"),
        (Because.FENCED, "queued", "released"),
    ],
)
async def test_a_cancelled_function_ends_as_the_reason_says_and_counts_no_failure(
    engine: AsyncEngine, settings: Settings, because: Because, where: str, ending: str
) -> None:
    began = asyncio.Event()

    async def job(session: AsyncSession) -> None:
        await note(session, "lost")
        began.set()
        await asyncio.Event().wait()

    async with a_work_with(settings, job) as work, heard() as told:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        task = start(work, run)
        await began.wait()

        assert run.cancel(because)
        assert not run.cancel(Because.STOPPING)  # the first reason stands
        await task

        found, (attempt,) = await row(engine, job_id), await attempts(engine, job_id)
        assert (found.state, found.failures, attempt.ending, attempt.error) == (where, 0, ending, str(because))
        assert await notes(engine) == []
        assert [one.reason for one in told if isinstance(one, RunCancelled)] == [str(because)]
        assert task.cancelling() == 0


async def test_a_function_that_lost_its_lease_writes_nothing_more(engine: AsyncEngine, settings: Settings) -> None:
    began = asyncio.Event()

    async def job(session: AsyncSession) -> None:
        await note(session, "lost")
        began.set()
        await asyncio.Event().wait()

    async with a_work_with(settings, job) as work, heard() as told:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        task = start(work, run)
        await began.wait()
        await _take_away(engine)

        run.cancel(Because.LEASE_LOST)
        await task

        assert await attempts(engine, job_id) == []
        assert await notes(engine) == []
        assert any(isinstance(one, StaleWriteRefused) for one in told)
        assert work.holdings.runs() == {}


async def _take_away(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET state = 'queued', token = NULL"))


async def test_a_job_that_swallows_its_cancellation_and_returns_has_succeeded(
    engine: AsyncEngine, settings: Settings
) -> None:
    began = asyncio.Event()

    async def job(session: AsyncSession) -> str:
        await note(session, "kept")
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "went on"
        raise AssertionError

    async with a_work_with(settings, job) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        task = start(work, run)
        await began.wait()

        run.cancel(Because.STOPPING)
        await task

        assert (await row(engine, job_id)).result == "went on"
        assert await notes(engine) == ["kept"]
        assert task.cancelling() == 0  # else the timeouts of what follows would not work


async def test_after_the_function_returned_a_cancellation_does_nothing(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def job(session: AsyncSession) -> str:
        await note(session, "kept")
        return "done"

    async with a_work_with(settings, job) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        answers: list[bool] = []
        signature = work.registry.get(NAME).signature
        real = type(signature).encode_result

        def cancelled_here(self: Any, value: object) -> str:
            answers.append(run.cancel(Because.STOPPING))
            return real(self, value)

        monkeypatch.setattr(type(signature), "encode_result", cancelled_here)
        await start(work, run)

        assert answers == [False]
        assert (await row(engine, job_id)).result == "done"
        assert await notes(engine) == ["kept"]


async def test_before_the_function_is_called_a_cancellation_does_nothing(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(ctx: JobContext) -> str:
        return "done"

    async with a_work_with(settings, job) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)

        assert not run.cancel(Because.STOPPING)
        await start(work, run)
        await work.flusher.drain()

        assert await state(engine, job_id) == "succeeded"
