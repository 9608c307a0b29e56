"""The attempt's connection: clean for the next one, given back whatever happened to it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.db.attempts import an_attempt, ask, run, words
from tests.db.moves import a_held_job
from tests.db.session_cases import write
from tests.support import until
from worker.flow.attempt import Attempt
from worker.flow.work import Work

pytestmark = [pytest.mark.leaves_running, pytest.mark.usefixtures("note_table")]

# ── what is left on the connection ──────────────────────────────────────────────────────────────────────────────────

LEFTOVERS = [
    ("SET search_path TO nowhere", "SELECT current_setting('search_path') = 'nowhere'"),
    ("SET ROLE pg_monitor", "SELECT current_user = 'pg_monitor'"),
    ("SELECT set_config('my.tenant', '7', false)", "SELECT current_setting('my.tenant', true) = '7'"),
    (
        "SELECT pg_advisory_lock(7)",
        "SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    ),
    ("CREATE TEMPORARY TABLE left_behind ()", "SELECT to_regclass('pg_temp.left_behind') IS NOT NULL"),
    ("LISTEN left_behind", "SELECT count(*) > 0 FROM pg_listening_channels()"),
    ("DECLARE left_behind CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*) > 0 FROM pg_cursors WHERE is_holdable"),
]


@pytest.mark.parametrize(("statement", "is_left"), LEFTOVERS, ids=lambda text_: text_)
async def test_what_a_job_left_on_its_connection_is_gone_for_the_next_one(
    work: Work, engine: AsyncEngine, statement: str, is_left: str
) -> None:
    seen: list[tuple[Any, Any]] = []
    second = await a_held_job(engine)

    async def looks(session: AsyncSession) -> None:
        seen.append(tuple((await session.execute(text(f"SELECT pg_backend_pid(), ({is_left})"))).one()))

    async with an_attempt(work) as attempt:
        await attempt.session().execute(text(statement))
        await attempt.session().commit()
        # Committed without the completion: under the role of one of these nobody may write to our tables.
        await attempt.in_greenlet(attempt.transaction.commit)
        pid = attempt.transaction.backend_pid
    await run(work, second, looks)

    assert seen == [(pid, False)]


# ── connections that break ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_transaction_that_was_ended_with_the_settings_of_the_completion_is_not_silent_for_long(
    work: Work, engine: AsyncEngine
) -> None:
    held = await a_held_job(engine)

    async def before_and_after(session: AsyncSession) -> list[str]:
        query = text("SELECT current_setting('idle_in_transaction_session_timeout')")
        return list((await session.execute(query)).scalars())

    async with an_attempt(work) as attempt:
        before = await before_and_after(attempt.session())
        await attempt.commit_success(held, "1")
    async with an_attempt(work) as attempt:
        after = await before_and_after(attempt.session())

    assert before == after == ["0"]


async def test_a_connection_that_the_server_ended_fails_the_attempt_and_closes_without_an_error(
    work: Work, engine: AsyncEngine
) -> None:
    held = await a_held_job(engine)
    async with an_attempt(work) as attempt:
        await write(attempt.session(), "a")
        await ask(engine, f"SELECT pg_terminate_backend({attempt.transaction.backend_pid}, 5000)")

        with pytest.raises(DBAPIError):
            await attempt.commit_success(held, "1")

    assert await words(engine) == set()
    assert work.jobs_engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # the pool's own, a queue


async def test_a_discarded_connection_closes_without_an_error_and_is_replaced(work: Work, engine: AsyncEngine) -> None:
    async with an_attempt(work) as attempt:
        await write(attempt.session(), "a")
        before = attempt.transaction.backend_pid
        await attempt.discard()

    async with an_attempt(work) as attempt:
        await write(attempt.session(), "a")
        after = attempt.transaction.backend_pid

    assert before != after
    assert work.jobs_engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # the pool's own, a queue


async def test_closing_after_the_connection_was_discarded_asks_for_no_other(work: Work) -> None:
    async with an_attempt(work) as attempt:
        await write(attempt.session(), "a")
        await attempt.discard()
        made: list[Any] = []
        event.listen(work.jobs_engine.sync_engine, "connect", lambda *_: made.append(1))

    assert made == []


async def test_a_close_that_is_cancelled_throws_the_connection_away(work: Work, engine: AsyncEngine) -> None:
    attempt = Attempt(work)
    await attempt.session().execute(text("SELECT pg_advisory_lock(7)"))
    pid = attempt.transaction.backend_pid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.db.transaction.RESET", "SELECT pg_sleep(60)")
        sleeps = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
        closing = asyncio.create_task(attempt.close())
        await until(lambda: ask(engine, f"{sleeps} AND pid = {pid}"), "reset")
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

    await until(lambda: nobody_is(engine, pid), "the connection is gone")
    assert work.jobs_engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # the pool's own, a queue


async def nobody_is(engine: AsyncEngine, pid: int | None) -> bool:
    return bool(await ask(engine, f"SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = {pid}"))


@pytest.mark.parametrize(
    "statement",
    ["ROLLBACK TO SAVEPOINT mine", "rollback transaction to mine", "SELECT 'COMMIT'", "/* COMMIT */ SELECT 1"],
)
async def test_a_savepoint_of_the_jobs_own_is_no_escape(work: Work, engine: AsyncEngine, statement: str) -> None:
    held = await a_held_job(engine)

    async def body(session: AsyncSession) -> None:
        await session.execute(text("SAVEPOINT mine"))
        await session.execute(text(statement))

    assert await run(work, held, body)
