"""Commits of a job's own: real ones, each behind the fence, and at most once per attempt."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from arq.connections import ArqRedis
from sqlalchemy import Connection, event, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from tests.flow.helpers import NAME, a_work_with, claimed, end_backend, note, notes, run_job, run_new, start
from tests.support import a_job, a_locked_row, attempts, heard, hints, row, state, until
from worker import enqueue
from worker.core.errors import LeaseLost
from worker.flow.holdings import Because
from worker.observe.events import CommitInDoubt, StaleWriteRefused
from worker.settings import Settings

pytestmark = pytest.mark.usefixtures("note_table")

OWN: dict[str, Any] = {"commits": "own"}


async def _lose(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET state = 'queued', token = NULL, worker_id = NULL"))


async def _due(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET run_at = now()"))


async def test_what_a_job_has_committed_is_seen_while_it_runs(engine: AsyncEngine, settings: Settings) -> None:
    seen: list[list[str]] = []

    async def job(session: AsyncSession) -> str:
        await note(session, "first")
        await session.commit()
        seen.append(await notes(engine))
        await note(session, "second")
        await session.rollback()
        await note(session, "third")
        return "done"

    async with a_work_with(settings, job, **OWN) as work:
        job_id, _ = await run_new(work, engine)

        found = await row(engine, job_id)
        assert seen == [["first"]]
        assert await notes(engine) == ["first", "third"]
        assert (found.state, found.result) == ("succeeded", "done")
        assert work.jobs_engine.pool.status().endswith("Current Checked out connections: 0")


async def test_an_attempt_that_fails_keeps_what_it_had_committed_and_the_next_one_sees_it(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> list[str]:
        before = list((await session.execute(text("SELECT word FROM note ORDER BY word"))).scalars())
        for step in ("1", "2", "3")[len(before) :]:
            async with session.begin_nested():
                await note(session, step)
            await session.commit()
            if step == "2":
                await note(session, "lost")
                raise ValueError("between two commits")
        return before

    async with a_work_with(settings, job, **OWN) as work:
        job_id, _ = await run_new(work, engine)
        assert await notes(engine) == ["1", "2"]
        await _due(engine)
        await run_job(work, job_id)

        found = await row(engine, job_id)
        assert await notes(engine) == ["1", "2", "3"]
        assert (found.state, found.result, found.failures) == ("succeeded", ["1", "2"], 1)


async def test_the_last_writes_commit_together_with_the_success(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> Any:
        await note(session, "kept")
        await session.commit()
        await note(session, "lost")
        return object()  # cannot be stored

    async with a_work_with(settings, job, **OWN) as work:
        await run_new(work, engine)

        assert await notes(engine) == ["kept"]


async def test_an_error_rolled_back_by_the_job_costs_what_came_since_its_last_commit(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "kept")
        await session.commit()
        try:
            await note(session, "kept")
        except IntegrityError:
            await session.rollback()
        await note(session, "too")
        await session.commit()

    async with a_work_with(settings, job, **OWN) as work:
        job_id, _ = await run_new(work, engine)

        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["kept", "too"])


# ── the fence ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by", ["session", "connection", "end"])
async def test_an_attempt_that_lost_its_job_commits_nothing_more(
    engine: AsyncEngine, settings: Settings, by: str
) -> None:
    raised: list[BaseException] = []

    async def job(session: AsyncSession) -> None:
        await note(session, "before")
        await session.commit()
        await _lose(engine)
        await note(session, "after")
        try:
            if by == "session":
                await session.commit()
            elif by == "connection":
                await (await session.connection()).commit()
        except LeaseLost as lost:  # even where the job goes on
            raised.append(lost)
            await session.rollback()
            await note(session, "later")

    async with a_work_with(settings, job, **OWN) as work, heard() as told:
        job_id, _ = await run_new(work, engine)

        assert await notes(engine) == ["before"]
        assert len(raised) == (by != "end")
        assert [type(one) for one in told] == [StaleWriteRefused]
        assert (await state(engine, job_id), await attempts(engine, job_id)) == ("queued", [])
        assert work.holdings.runs() == {}


async def test_a_commit_waits_for_who_moves_the_job_and_then_knows_who_holds_it(
    engine: AsyncEngine, settings: Settings
) -> None:
    written = asyncio.Event()

    async def job(session: AsyncSession) -> None:
        await note(session, "late")
        written.set()
        await session.commit()

    async with a_work_with(settings, job, **OWN) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        async with engine.begin() as mover:
            await mover.execute(text("UPDATE exarq.job SET state = 'queued', token = NULL, worker_id = NULL"))
            task = start(work, run)
            await written.wait()
            await until(lambda: _waits_for_a_lock(engine), "the commit waits")
        await task

        assert await notes(engine) == []


async def _waits_for_a_lock(engine: AsyncEngine) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with engine.connect() as connection:
        return bool((await connection.execute(text(query))).scalar())


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "END"])
async def test_a_commit_past_the_session_is_refused_as_everywhere(
    engine: AsyncEngine, settings: Settings, statement: str
) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "lost")
        await session.execute(text(statement))

    async with a_work_with(settings, job, **OWN) as work:
        job_id, _ = await run_new(work, engine)

        assert "TransactionEscaped" in (await row(engine, job_id)).error
        assert await notes(engine) == []


async def test_until_a_commit_of_its_own_has_ended_nobody_can_move_the_job(
    engine: AsyncEngine, settings: Settings
) -> None:
    free: list[Any] = []

    async def look() -> None:
        async with engine.connect() as connection:
            query = text("SELECT id FROM exarq.job FOR NO KEY UPDATE SKIP LOCKED")
            free.append((await connection.execute(query)).first())

    async def job(session: AsyncSession) -> None:
        await note(session, "kept")
        await session.commit()

    async with a_work_with(settings, job, **OWN) as work:
        event.listen(work.jobs_engine.sync_engine, "commit", lambda _: await_only(look()))
        await run_new(work, engine)

        assert free == [None, None]  # the job's own commit, and the completion


@pytest.mark.parametrize("bare", ["statement", "savepoint"])
async def test_a_commit_is_a_real_one_also_where_a_bare_statement_had_begun_the_transaction(
    engine: AsyncEngine, settings: Settings, redis: ArqRedis, bare: str
) -> None:
    seen: list[list[str]] = []

    def use(session: Session) -> None:
        connection = session.get_bind()
        assert isinstance(connection, Connection)
        if bare == "savepoint":
            connection.begin_nested()
        connection.execute(text("INSERT INTO note VALUES ('bare')"))

    async def job(session: AsyncSession) -> None:
        await session.run_sync(use)
        await note(session, "first")
        await enqueue(session, "tests.follow_up")
        await session.commit()
        seen.append(await notes(engine))
        await session.run_sync(lambda sync: inspect(sync.get_bind()).has_table("note"))
        await note(session, "rolled back")
        await session.rollback()
        await session.run_sync(lambda sync: inspect(sync.get_bind()).has_table("note"))
        await note(session, "with the success")

    async with a_work_with(settings, job, **OWN) as work:
        job_id, _ = await run_new(work, engine)
        await work.publisher.flush()

        assert seen == [["bare", "first"]]
        assert await notes(engine) == ["bare", "first", "with the success"]
        assert await state(engine, job_id) == "succeeded"
        assert len(await hints(redis)) == 1


async def test_a_joined_transaction_is_fenced_as_any_other(engine: AsyncEngine, settings: Settings) -> None:
    raised: list[LeaseLost] = []

    async def job(session: AsyncSession) -> None:
        await session.run_sync(lambda sync: inspect(sync.get_bind()).has_table("note"))
        await note(session, "lost")
        await _lose(engine)
        try:
            await session.commit()
        except LeaseLost as lost:
            raised.append(lost)

    async with a_work_with(settings, job, **OWN) as work, heard() as told:
        await run_new(work, engine)

        assert (len(raised), await notes(engine)) == (1, [])
        assert [type(one) for one in told] == [StaleWriteRefused]


async def test_a_success_whose_commit_did_not_take_place_is_none(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> None:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        await session.commit()
        await driver.transaction().start()  # SQLAlchemy does not know of it: its COMMIT ends a savepoint
        await note(session, "lost")

    async with a_work_with(settings, job, **OWN) as work, heard() as told:
        job_id, _ = await run_new(work, engine)

        found = await row(engine, job_id)
        assert (found.state, await notes(engine)) == ("queued", [])
        assert "TransactionEscaped" in found.error
        assert CommitInDoubt in [type(one) for one in told]
        assert work.counts.succeeded == 0


async def test_who_is_refused_a_commit_leaves_nothing_on_the_connection(
    engine: AsyncEngine, settings: Settings
) -> None:
    seen: list[tuple[Any, ...]] = []

    async def job(session: AsyncSession, lose: bool) -> None:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        look = text("SELECT current_setting('work_mem'), to_regclass('pg_temp.mine')::text")
        seen.append((driver, *(await session.execute(look)).one()))
        if lose:
            await session.execute(text("SET work_mem = '77MB'"))
            await session.execute(text("CREATE TEMP TABLE mine ()"))
            await session.commit()
            await note(session, "lost")
            await _lose(engine)
            await session.commit()

    async with a_work_with(settings, job, **OWN) as work:
        for lose in (False, True, False):
            async with engine.begin() as connection:
                await connection.execute(text("DELETE FROM exarq.job"))
            await run_new(work, engine, args={"lose": lose})

    assert seen[0] == seen[1] == seen[2]  # the same connection too: nothing had to be thrown away


@pytest.mark.parametrize("joined", [False, True])
async def test_what_a_refused_commit_would_have_kept_is_gone_where_the_job_goes_on(
    engine: AsyncEngine, settings: Settings, joined: bool
) -> None:
    async def job(session: AsyncSession) -> None:
        if joined:
            await session.run_sync(lambda sync: inspect(sync.get_bind()).has_table("note"))
        await note(session, "rolled back")
        await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
        async with a_locked_row(engine, job_id):
            with pytest.raises(DBAPIError):
                await session.commit()
        await session.rollback()
        await note(session, "kept")
        await session.commit()

    async with a_work_with(settings, job, **OWN) as work:
        job_id = await a_job(engine, name=NAME)
        await run_job(work, job_id)

        assert (await state(engine, job_id), await notes(engine)) == ("succeeded", ["kept"])


# ── connections and cancellation ────────────────────────────────────────────────────────────────────────────────────


async def test_a_connection_that_dies_between_two_commits_costs_an_attempt_and_no_failure(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> None:
        count = (await session.execute(text("SELECT count(*) FROM note"))).scalar_one()
        await note(session, f"{count}")
        await session.commit()
        if count == 0:
            await note(session, "lost")
            await end_backend(engine, (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())
            await note(session, "never sent")

    async with a_work_with(settings, job, **OWN) as work:
        job_id, _ = await run_new(work, engine)
        assert await notes(engine) == ["0"]
        await _due(engine)
        await run_job(work, job_id)

        found = await row(engine, job_id)
        assert await notes(engine) == ["0", "1"]
        assert (found.state, found.failures, found.attempt) == ("succeeded", 0, 2)


async def test_a_cancelled_job_keeps_what_it_had_committed(engine: AsyncEngine, settings: Settings) -> None:
    began = asyncio.Event()

    async def job(session: AsyncSession) -> None:
        await note(session, "kept")
        await session.commit()
        await note(session, "lost")
        began.set()
        await asyncio.Event().wait()

    async with a_work_with(settings, job, **OWN) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        task = start(work, run)
        await began.wait()
        run.cancel(Because.CANCEL_REQUESTED)
        await task

        assert (await state(engine, job_id), await notes(engine)) == ("cancelled", ["kept"])


# ── follow-ups ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_follow_ups_are_published_by_the_commit_that_wrote_them(
    engine: AsyncEngine, settings: Settings, redis: ArqRedis
) -> None:
    known: list[tuple[int, int]] = []

    async def job(session: AsyncSession) -> None:
        await enqueue(session, "tests.kept")
        before = len(await hints(redis))
        await session.commit()
        await until(lambda: hints(redis), "the hint is there while the job runs")
        known.append((before, len(await hints(redis))))
        await enqueue(session, "tests.lost")
        await session.rollback()
        await enqueue(session, "tests.last")

    async with a_work_with(settings, job, **OWN) as work:
        await run_new(work, engine)
        await work.publisher.flush()

        assert known == [(0, 1)]
        assert len(await hints(redis)) == 2
