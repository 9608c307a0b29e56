"""What jobs do wrong, and that neither the promise nor the worker suffers from it."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from tests.flow.helpers import NAME, a_work_with, claimed, note, notes, registry_of, run_new, start
from tests.support import a_job, attempts, row, run_all, state, until
from worker import ArgumentsInvalid, DefinitionError, SchemaNotMigrated, Snooze, enqueue, job
from worker.core.context import JobContext
from worker.db import transitions
from worker.settings import Settings

pytestmark = pytest.mark.usefixtures("note_table")


@pytest.mark.parametrize("command", ["COMMIT", "; COMMIT", "/* a */ -- b\n;;commit", "END", "ROLLBACK"])
async def test_a_command_that_ends_the_transaction_is_refused_and_nothing_is_kept(
    engine: AsyncEngine, settings: Settings, command: str
) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "x")
        await session.execute(text(command))

    async with a_work_with(settings, job, max_attempts=1) as work:
        job_id, _ = await run_new(work, engine)

    assert await state(engine, job_id) == "failed"
    assert await notes(engine) == []


async def test_a_statement_behind_many_comments_is_run_and_holds_nothing_up(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> int:
        return int((await session.execute(text("/* banner */\n" * 200 + "SELECT 7"))).scalar_one())

    async with a_work_with(settings, job) as work:
        job_id, _ = await run_new(work, engine)

    assert (await row(engine, job_id)).result == 7


async def test_a_task_that_outlives_its_job_takes_no_connection_and_writes_nothing(
    engine: AsyncEngine, settings: Settings
) -> None:
    goes_on = asyncio.Event()
    said: list[BaseException] = []

    async def late(session: AsyncSession) -> None:
        await goes_on.wait()
        try:
            await note(session, "late")
        except Exception as error:
            said.append(error)

    async def fails() -> None:
        raise ValueError

    async def job(session: AsyncSession) -> None:
        await asyncio.gather(fails(), late(session))

    async with a_work_with(settings, job, max_attempts=1) as work:
        await run_new(work, engine)
        goes_on.set()
        await until(lambda: said, "the late statement is refused")

        assert "the attempt has ended" in str(said[0])
        assert work.jobs_engine.pool.status().endswith("Current Checked out connections: 0")
    assert await notes(engine) == []


class RateLimited(Snooze):
    """As people write them: without the constructor of its base, and so without a delay."""

    def __init__(self, status: int) -> None:
        self.status = status


@pytest.mark.parametrize(
    "error", [RateLimited(429), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
async def test_whatever_a_job_raises_counts_as_a_failure_and_ends_it(
    engine: AsyncEngine, settings: Settings, error: BaseException
) -> None:
    async def job(session: AsyncSession) -> None:
        raise error

    async with a_work_with(settings, job, max_attempts=1) as work:
        job_id, _ = await run_new(work, engine)

    assert await state(engine, job_id) == "failed"
    (attempt,) = await attempts(engine, job_id)
    assert type(error).__name__ in attempt.error


async def test_a_success_that_a_slow_server_would_not_store_in_time_is_stored_later(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, slow = transitions.succeed_many, [True]

    async def succeed_many(connection: AsyncConnection, results: Any, remarks: Any) -> Any:
        if slow.pop() if slow else False:
            await connection.execute(text("SET statement_timeout = 50"))
            try:
                await connection.execute(text("SELECT pg_sleep(10)"))
            finally:
                await connection.execute(text("RESET statement_timeout"))
        return await real(connection, results, remarks)

    async def job(ctx: JobContext) -> int:
        return 7

    monkeypatch.setattr(transitions, "succeed_many", succeed_many)
    async with a_work_with(settings, job, max_attempts=1) as work:
        job_id, _ = await run_new(work, engine)

    found = await row(engine, job_id)
    assert (found.state, found.result, found.failures) == ("succeeded", 7, 0)


async def test_jobs_that_fill_all_slots_may_each_open_a_session_of_their_own(
    engine: AsyncEngine, settings: Settings
) -> None:
    all_began = asyncio.Barrier(settings.worker.concurrency)

    async def job(ctx: JobContext) -> None:
        await ctx.session.execute(text("SELECT 1"))
        await all_began.wait()
        async with ctx["sessions"]() as session:
            await session.execute(text("SELECT 1"))

    ids = [await a_job(engine, name=NAME) for _ in range(settings.worker.concurrency)]
    await run_all(settings, registry_of(job, timeout=20))

    assert {await state(engine, job_id) for job_id in ids} == {"succeeded"}


async def test_an_enqueue_before_the_first_upgrade_says_what_to_do(
    engine: AsyncEngine, sessions: async_sessionmaker[AsyncSession]
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA exarq CASCADE"))

    with pytest.raises(SchemaNotMigrated, match="exarq db upgrade"):
        async with sessions.begin() as session:
            await enqueue(session, "tests.job")


@pytest.mark.parametrize("queue", ["arq:queue", "exarq:wake:default"])
async def test_a_queue_cannot_have_the_name_of_another_key_in_redis(
    sessions: async_sessionmaker[AsyncSession], queue: str
) -> None:
    async def fn(ctx: JobContext) -> None: ...

    with pytest.raises(DefinitionError, match="begins with"):
        job(queue=queue)(fn)
    async with sessions.begin() as session:
        with pytest.raises(ArgumentsInvalid, match="begins with"):
            await enqueue(session, "tests.job", queue=queue)


async def test_a_cancelled_wait_for_a_connection_leaves_none_behind(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "x")
        await asyncio.sleep(60)

    async with a_work_with(settings, job, timeout=0.2, max_attempts=1) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        await start(work, run)

        assert await state(engine, job_id) == "failed"
        assert work.jobs_engine.pool.status().endswith("Current Checked out connections: 0")
    assert await notes(engine) == []


@pytest.mark.parametrize("hidden", [True, False])
async def test_values_that_a_job_sent_are_not_stored_with_its_error_unless_the_settings_say_so(
    engine: AsyncEngine, settings: Settings, hidden: bool
) -> None:
    card = str(uuid4())

    async def job(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO nowhere VALUES (:card)"), {"card": card})

    database = settings.database.model_copy(update={} if hidden else {"hide_parameters": False})
    async with a_work_with(settings.model_copy(update={"database": database}), job, max_attempts=1) as work:
        job_id, _ = await run_new(work, engine)

    (attempt,) = await attempts(engine, job_id)
    assert "nowhere" in attempt.error
    assert (card in attempt.error, card in attempt.traceback) == (not hidden, not hidden)
