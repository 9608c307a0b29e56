"""One attempt's session and transaction, and what a job can do to them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.flow.helpers import a_work_with, end_backend, note, notes, run_new
from tests.proxy import postgres_proxy
from tests.support import a_work, attempts, heard, row, state
from worker.core.context import JobContext
from worker.core.errors import TransactionEscaped
from worker.db.ids import uuid7
from worker.db.transitions import Held
from worker.flow import attempt as module
from worker.flow.attempt import Attempt
from worker.observe.events import AttemptEnded
from worker.settings import Settings, load_settings

pytestmark = pytest.mark.usefixtures("note_table")


async def test_an_attempt_without_a_session_commits_nothing_and_closes_nothing(settings: Settings) -> None:
    async with a_work(settings) as work:
        attempt = Attempt(work)

        assert not await attempt.commit_success(Held(uuid7(), uuid7()), "null")
        await attempt.close()

        assert not attempt.transaction.taken
        assert attempt.hints == []


async def test_a_session_that_is_first_used_after_the_attempt_takes_no_connection(settings: Settings) -> None:
    async with a_work(settings) as work:
        attempt = Attempt(work)

        await attempt.close()

        with pytest.raises(TransactionEscaped, match="the attempt has ended"):
            await attempt.session().execute(text("SELECT 1"))
        assert not attempt.transaction.taken


async def test_an_attempt_has_one_session(engine: AsyncEngine, settings: Settings) -> None:
    same: list[bool] = []

    async def job(ctx: JobContext) -> None:
        same.append(ctx.session is ctx.session)
        await note(ctx.session, "kept")

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)

        assert same == [True]
        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["kept"])


async def test_a_swallowed_error_fails_the_attempt_with_advice(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "once")
        try:
            await note(session, "once")
        except IntegrityError:
            return
        raise AssertionError

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)

        (attempt,) = await attempts(engine, job_id)
        assert "TransactionAborted" in attempt.error
        assert "session.rollback()" in attempt.error
        assert await notes(engine) == []


async def test_an_error_rolled_back_by_the_job_keeps_what_it_had_committed(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "first")
        await session.commit()
        try:
            await note(session, "first")
        except IntegrityError:
            await session.rollback()
        await note(session, "second")

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)

        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["first", "second"])


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
async def test_a_transaction_ended_behind_the_sessions_back_fails_the_attempt(
    engine: AsyncEngine, settings: Settings, statement: str
) -> None:
    async def job(session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))
        await session.execute(text(statement))

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)

        (attempt,) = await attempts(engine, job_id)
        assert "TransactionEscaped" in attempt.error


async def test_the_jobs_own_error_stands_when_its_connection_died_too(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "lost")
        await session.commit()
        pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await end_backend(engine, pid)
        raise ValueError("of my own")

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)
        again, _ = await run_new(work, engine)

        assert (await row(engine, job_id)).error == (await row(engine, again)).error == "ValueError: of my own"
        assert work.jobs_engine.pool.status().endswith("Current Checked out connections: 0")


async def test_a_close_that_fails_leaves_a_committed_success_as_it_is(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def job(session: AsyncSession) -> str:
        await note(session, "kept")
        return "done"

    def fail(*_args: Any) -> None:
        raise RuntimeError("cannot be closed")

    async with a_work_with(settings, job) as work, heard() as told:
        monkeypatch.setattr(work.sessions.kw["sync_session_class"], "_leave_uncommitted", fail)
        job_id, _ = await run_new(work, engine)
        monkeypatch.undo()

        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["kept"])
        assert [type(one) for one in told] == [AttemptEnded]
        assert "Current Checked out connections: 0" in work.jobs_engine.pool.status()


async def test_a_server_that_falls_silent_does_not_keep_the_slot(
    engine: AsyncEngine, settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CLOSE_LIMIT", timedelta(seconds=2))  # it must come as far as the ROLLBACK

    async def job(session: AsyncSession) -> None:
        await note(session, "lost")
        raise ValueError("of my own")

    async with postgres_proxy(database_url) as (proxy, url):
        behind = load_settings(database={"url": url}, redis={"url": settings.redis.url}, worker={"lease": 5})
        async with a_work_with(behind, job) as work:
            async with work.jobs_engine.connect():
                pass  # the first connection asks for more than a job does
            proxy.lose_the_answer_to(lambda asked: b"ROLLBACK" in asked, cut="never")

            job_id, _ = await run_new(work, engine)

            assert proxy.lost.is_set()
            assert (await row(engine, job_id)).error == "ValueError: of my own"
            assert await notes(engine) == []


async def test_what_a_job_left_on_its_connection_is_gone_for_the_next(engine: AsyncEngine, settings: Settings) -> None:
    found: list[Any] = []

    async def job(session: AsyncSession) -> None:
        found.append((await session.execute(text("SHOW work_mem"))).scalar_one())
        locks = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
        found.append((await session.execute(locks)).scalar_one())
        await session.execute(text("SET work_mem = '7MB'"))
        await session.execute(text("SELECT pg_advisory_lock(7)"))

    async with a_work_with(settings, job) as work:
        await run_new(work, engine)
        await run_new(work, engine)

        assert found[:2] == found[2:]
        assert found[1] == 0
