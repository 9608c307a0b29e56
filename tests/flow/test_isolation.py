"""Isolation and read-only attempts: what PostgreSQL is told, and how such attempts end."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from tests.flow.helpers import NAME, a_work_with, claimed, note, notes, run_job, run_new, start
from tests.support import a_job, attempts, heard, row
from worker import JobContext, ReadOnlyJob, enqueue
from worker.observe.events import StaleWriteRefused
from worker.settings import Settings

pytestmark = pytest.mark.usefixtures("note_table")


async def shown(session: AsyncSession) -> list[str]:
    names = ("transaction_isolation", "transaction_read_only")
    return [(await session.execute(text(f"SHOW {name}"))).scalar_one() for name in names]


# ── isolation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"isolation": "REPEATABLE READ"}, ["repeatable read", "off"]),
        ({"isolation": "SERIALIZABLE"}, ["serializable", "off"]),
        ({"read_only": True}, ["read committed", "on"]),
        ({"isolation": "SERIALIZABLE", "read_only": True}, ["serializable", "on"]),
        ({"isolation": "SERIALIZABLE", "commits": "own"}, ["serializable", "off"]),
    ],
)
async def test_the_transaction_is_as_the_definition_says_and_the_next_one_on_that_connection_is_not(
    engine: AsyncEngine, settings: Settings, options: dict[str, Any], expected: list[str]
) -> None:
    async def job(session: AsyncSession) -> list[str]:
        return await shown(session)

    async with a_work_with(settings, job, **options) as work:
        job_id, _ = await run_new(work, engine)

        assert (await row(engine, job_id)).result == expected
        async with work.sessions() as session:
            assert await shown(session) == ["read committed", "off"]


async def test_an_isolated_attempt_costs_no_round_trip_more(engine: AsyncEngine, settings: Settings) -> None:
    sent: list[str] = []

    async def job(session: AsyncSession) -> None:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        driver.add_query_logger(lambda query: sent.append(query.query))
        await note(session, "kept")

    async with a_work_with(settings, job, isolation="SERIALIZABLE") as work:
        await run_new(work, engine)

    begin, commit = sent  # prepared statements are not shown
    assert begin == "BEGIN ISOLATION LEVEL SERIALIZABLE;"
    assert "COMMIT;" in commit  # and what goes along with it


async def test_an_attempt_that_could_not_be_serialized_is_tried_again_and_counts_as_no_failure(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> None:
        (count,) = (await session.execute(text("SELECT count(*) FROM note"))).one()
        if count == 0:  # the first attempt: somebody reads and writes what we read and write
            async with engine.connect() as other:
                await other.execution_options(isolation_level="SERIALIZABLE")
                await other.execute(text("SELECT count(*) FROM note"))
                await other.execute(text("INSERT INTO note VALUES ('other')"))
                await other.commit()
        await note(session, f"after {count}")

    async with a_work_with(settings, job, isolation="SERIALIZABLE") as work:
        job_id, _ = await run_new(work, engine)

        (attempt,) = await attempts(engine, job_id)
        assert "could not serialize access" in attempt.error
        assert await notes(engine) == ["other"]
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET run_at = now()"))
        await run_job(work, job_id)

        assert await notes(engine) == ["after 1", "other"]
        found = await row(engine, job_id)
        assert (found.state, found.failures, found.attempt) == ("succeeded", 0, 2)


def repeatable_read(url: str) -> Any:
    return async_sessionmaker(create_async_engine(url, isolation_level="REPEATABLE READ"))


def serializable(url: str) -> Any:
    return async_sessionmaker(create_async_engine(url, isolation_level="SERIALIZABLE"))


def serializable_by_option(url: str) -> Any:
    return async_sessionmaker(create_async_engine(url).execution_options(isolation_level="SERIALIZABLE"))


def as_the_server_has_it(url: str) -> Any:
    return async_sessionmaker(create_async_engine(url))


async def let_the_server_isolate(engine: AsyncEngine) -> None:
    """From now on, the transactions of a new connection to this database are serializable unless they say otherwise."""
    async with engine.begin() as connection:
        default = "default_transaction_isolation = 'serializable'"
        await connection.execute(text(f"ALTER DATABASE {engine.url.database} SET {default}"))


def with_sessions(settings: Settings, make: Any) -> Settings:
    named = settings.database.model_copy(update={"sessions": f"{__name__}:{make.__name__}"})
    return settings.model_copy(update={"database": named})


@pytest.mark.parametrize("make", [repeatable_read, serializable_by_option, as_the_server_has_it])
async def test_progress_is_refused_at_once_also_where_the_engine_isolates(
    engine: AsyncEngine, settings: Settings, make: Any
) -> None:
    async def job(ctx: JobContext) -> None:
        ctx.progress(1)

    if make is as_the_server_has_it:
        await let_the_server_isolate(engine)
    async with a_work_with(with_sessions(settings, make), job) as work:
        job_id, _ = await run_new(work, engine)

        assert "do not go together" in (await row(engine, job_id)).error


async def test_a_definition_comes_before_the_engine(engine: AsyncEngine, settings: Settings) -> None:
    async def job(ctx: JobContext) -> list[str]:
        ctx.progress(1)
        return await shown(ctx.session)

    async with a_work_with(with_sessions(settings, serializable), job, isolation="READ COMMITTED") as work:
        job_id, _ = await run_new(work, engine)

        assert (await row(engine, job_id)).result == ["read committed", "off"]


# ── read-only ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("isolation", [None, "SERIALIZABLE"])
async def test_a_read_only_job_succeeds_with_its_result(
    engine: AsyncEngine, settings: Settings, isolation: str | None
) -> None:
    async def job(session: AsyncSession) -> int:
        async with session.begin():
            return int((await session.execute(text("SELECT count(*) FROM note"))).scalar_one())

    async with a_work_with(settings, job, read_only=True, isolation=isolation) as work:
        job_id, _ = await run_new(work, engine)

        found = await row(engine, job_id)
        assert (found.state, found.result) == ("succeeded", 0)
        assert work.jobs_engine.pool.status().endswith("Current Checked out connections: 0")


async def test_a_read_only_job_that_writes_fails_with_postgresqls_own_words(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> None:
        await note(session, "refused")

    async with a_work_with(settings, job, read_only=True) as work:
        job_id, _ = await run_new(work, engine)

        found = await row(engine, job_id)
        assert "cannot execute INSERT in a read-only transaction" in found.error
        assert found.failures == 1


@pytest.mark.parametrize("make", [None, serializable, serializable_by_option, as_the_server_has_it])
async def test_what_a_serializable_report_has_said_stays_true(
    engine: AsyncEngine, settings: Settings, make: Any
) -> None:
    """Day 1 is closed and reported without notes; who still takes it for open can write no more note for it."""
    reads = (text("SELECT * FROM day"), text("SELECT count(*) FROM note"))

    async def job(session: AsyncSession) -> list[int]:
        return [(await session.execute(read)).scalar_one() for read in reads]

    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE day AS SELECT 1"))
    options: dict[str, Any] = {"isolation": "SERIALIZABLE"}
    if make is not None:
        settings, options = with_sessions(settings, make), {}
    if make is as_the_server_has_it:
        await let_the_server_isolate(engine)
    isolated = engine.execution_options(isolation_level="SERIALIZABLE")
    async with (
        a_work_with(settings, job, read_only=True, **options) as work,
        isolated.connect() as late,
    ):
        await late.execute(reads[0])
        async with isolated.begin() as closing:
            await closing.execute(text('UPDATE day SET "?column?" = 2'))
        job_id, _ = await run_new(work, engine)
        assert (await row(engine, job_id)).result == [2, 0]

        with pytest.raises(DBAPIError, match="could not serialize access"):
            await late.execute(text("INSERT INTO note VALUES ('for day 1')"))


@pytest.mark.parametrize("isolation", [None, "SERIALIZABLE"])
@pytest.mark.parametrize("statement", ["SET TRANSACTION READ WRITE", "set local transaction_read_only = off"])
async def test_a_read_only_job_that_made_its_transaction_write_fails_and_nothing_stays(
    engine: AsyncEngine, settings: Settings, isolation: str | None, statement: str
) -> None:
    async def job(session: AsyncSession) -> None:
        await session.execute(text(statement))
        await note(session, "smuggled")
        await session.commit()

    async with a_work_with(settings, job, read_only=True, isolation=isolation) as work:
        job_id, _ = await run_new(work, engine)

        found = await row(engine, job_id)
        assert (found.state, found.failures, await notes(engine)) == ("queued", 1, [])
        assert "leave SET TRANSACTION out" in found.error


async def test_a_read_only_job_enqueues_nothing_and_is_told_where_to(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> str:
        with pytest.raises(ReadOnlyJob, match="this job is read_only, and a follow-up is something it writes"):
            await enqueue(session, "tests.other")
        return "went on"

    async with a_work_with(settings, job, read_only=True) as work:
        job_id, _ = await run_new(work, engine)

        assert (await row(engine, job_id)).result == "went on"


async def test_a_read_only_attempt_that_lost_its_job_stores_nothing(engine: AsyncEngine, settings: Settings) -> None:
    async def job(session: AsyncSession) -> int:
        async with engine.begin() as other:
            await other.execute(text("UPDATE exarq.job SET token = gen_random_uuid()"))
        return int((await session.execute(text("SELECT 1"))).scalar_one())

    async with a_work_with(settings, job, read_only=True) as work, heard() as told:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        await start(work, run)
        await work.flusher.drain()

        assert (await row(engine, job_id)).result is None
        assert any(isinstance(event, StaleWriteRefused) for event in told)
        async with engine.begin() as connection:  # nobody is left to end it
            await connection.execute(text("UPDATE exarq.job SET state = 'cancelled', finished_at = now()"))
