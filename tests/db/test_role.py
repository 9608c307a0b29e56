"""Each role of `docs/roles.sql` can do its work, and nothing else."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from tests.life import jobs_for_tests as jobs
from tests.support import a_job, a_worker, attempts, heard, row, state, until
from worker.core.context import JobContext
from worker.db import workers
from worker.db.failures import sqlstate_of
from worker.db.ids import uuid7
from worker.flow.job import JobFunction
from worker.flow.publish import Publisher
from worker.observe.events import Pruned, Reconciled, Ticked, WorkerRescued
from worker.settings import Settings

ROLES_SQL = Path(__file__).parents[2] / "docs" / "roles.sql"
LONG_AGO = datetime.now(UTC) - timedelta(days=60)


@pytest.fixture
async def suffix(engine: AsyncEngine) -> AsyncIterator[str]:
    """The roles of the file under names of this test alone, with a table that the worker's jobs may write."""
    ours = f"_{uuid4().hex[:12]}"
    script = re.sub(r"\b(exarq_(?:worker|service|enqueue|reader))\b", rf"\g<1>{ours}", ROLES_SQL.read_text())
    await jobs.make_effects(engine)
    async with engine.begin() as connection:
        await connection.execute(text("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA exarq FROM PUBLIC"))  # as some are told to
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.execute(script.replace(" LOGIN;", " LOGIN PASSWORD 'p';"))
        await connection.execute(text(f"GRANT INSERT ON effect TO exarq_worker{ours}"))
    yield ours
    async with engine.begin() as connection:
        await connection.execute(text("GRANT EXECUTE ON FUNCTION exarq.succeed TO PUBLIC"))
        for role in re.findall(r"CREATE ROLE (\w+)", script):
            await connection.execute(text(f"DROP OWNED BY {role}"))
            await connection.execute(text(f"DROP ROLE {role}"))


def address(database_url: str, role: str) -> str:
    return make_url(database_url).set(username=role, password="p").render_as_string(hide_password=False)


@pytest.fixture
def as_worker(settings: Settings, database_url: str, suffix: str) -> Settings:
    """The settings of a worker under its own role."""
    database = settings.database.model_copy(update={"url": address(database_url, f"exarq_worker{suffix}")})
    return settings.model_copy(update={"database": database})


async def refused(engine: AsyncEngine, statement: str) -> bool:
    """Whether the server says that this role may not do it."""
    try:
        async with engine.begin() as connection:
            await connection.execute(text(statement))
    except DBAPIError as error:
        return sqlstate_of(error) == "42501"
    return False


async def follows(ctx: JobContext) -> None:
    """Fail once, then enqueue a job that follows."""
    if ctx.attempt == 1:
        raise ValueError("not yet")
    await jobs.note.enqueue(ctx.session, "follow-up")


async def ticks(ctx: JobContext) -> None:
    """What the clock enqueues."""


async def test_a_workers_role_suffices_for_all_it_does(
    engine: AsyncEngine, sessions: async_sessionmaker[AsyncSession], as_worker: Settings
) -> None:
    following = JobFunction(follows, name="tests.follows")
    registry = jobs.registry()
    registry.register(following)
    registry.register(JobFunction(ticks, name="tests.ticks", every=1))
    old = await a_job(engine, state="succeeded", finished_at=LONG_AGO)
    unknown_to_redis = await a_job(engine, name="tests.nothing")

    async with heard() as told, a_worker(as_worker, registry):
        ids = await jobs.enqueue_all(sessions, jobs.note.call("first"), following.call(), jobs.nothing.call())
        (long,) = await jobs.enqueue_all(sessions, jobs.slow.call("long", 60))
        await until(lambda: _are(engine, [*ids, unknown_to_redis], "succeeded"), "all jobs run")
        await until(lambda: _are(engine, [long], "running"), "the long job runs")
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET cancel_requested = true WHERE id = :id"), {"id": long})
        await until(lambda: _are(engine, [long], "cancelled"), "the beat sees the flag")
        await until(lambda: _are(engine, [old], None), "the old job is pruned")
        await until(lambda: any(isinstance(event, Ticked) for event in told), "the clock ticks")

    assert await jobs.effects(engine) == ["first", "follow-up"]
    assert {type(event) for event in told} >= {Pruned, Reconciled, Ticked}


@pytest.mark.hasty
async def test_a_workers_role_ends_the_connection_of_a_zombie_and_takes_its_jobs(
    engine: AsyncEngine, as_worker: Settings
) -> None:
    dead = uuid7()
    job = await a_job(engine, name="tests.note", args={"word": "rescued"}, state="running", worker_id=dead)
    async with engine.begin() as connection:
        await workers.register(connection, dead, queues=["default"], concurrency=1)
    name = {"application_name": f"exarq {dead}"}
    zombie = create_async_engine(str(as_worker.database.url), connect_args={"server_settings": name})
    connection = await zombie.connect()
    try:
        await connection.execute(text("SELECT 1 FROM exarq.job WHERE id = :id FOR NO KEY UPDATE"), {"id": job})

        async with heard() as told, a_worker(as_worker, jobs.registry()):
            await until(lambda: _are(engine, [job], "succeeded"), "the job runs again")

        with pytest.raises(DBAPIError):
            await connection.execute(text("SELECT 1"))
    finally:
        await connection.close()
        await zombie.dispose()
    assert [event.jobs for event in told if isinstance(event, WorkerRescued)] == [1]
    assert [one.ending for one in await attempts(engine, job)] == ["crashed"]
    assert await jobs.effects(engine) == ["rescued"]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE exarq.mine (a int)",
        "CREATE SCHEMA mine",
        "DROP TABLE exarq.job",
        "TRUNCATE exarq.job",
        "ALTER TABLE exarq.job ADD COLUMN a int",
        "UPDATE exarq.installation SET id = gen_random_uuid()",
        "UPDATE exarq.attempt SET error = NULL",
        "DELETE FROM exarq.upkeep",
        "UPDATE exarq.alembic_version SET version_num = '0'",
        "SELECT * FROM effect",
    ],
)
async def test_a_workers_role_can_do_nothing_else(statement: str, as_worker: Settings) -> None:
    engine = create_async_engine(str(as_worker.database.url))

    assert await refused(engine, statement)
    await engine.dispose()


async def test_a_services_role_enqueues_and_sees_nothing_of_others(
    engine: AsyncEngine, database_url: str, suffix: str, publisher: Publisher
) -> None:
    service = create_async_engine(address(database_url, f"exarq_service{suffix}"))
    try:
        async with AsyncSession(service, info=publisher.info) as session, session.begin():
            handle = await jobs.note.enqueue(session, "from a service")

        for statement in ("SELECT args FROM exarq.job", "UPDATE exarq.job SET queue = 'x'", "DELETE FROM exarq.job"):
            assert await refused(service, statement)
        assert await refused(service, "SELECT * FROM exarq.attempt")
    finally:
        await service.dispose()
    assert await state(engine, handle.id) == "queued"


@pytest.mark.leaves_hints  # nobody claims here
async def test_a_services_role_enqueues_with_all_that_an_enqueue_can_say(
    engine: AsyncEngine, database_url: str, suffix: str, publisher: Publisher
) -> None:
    service = create_async_engine(address(database_url, f"exarq_service{suffix}"))
    short = {"key": "b", "unique": timedelta(seconds=60)}
    said: list[tuple[dict[str, Any], str]] = [
        ({"priority": 1}, "created"),
        ({"expires": 60}, "created"),
        ({"key": "a"}, "created"),
        ({"key": "a"}, "exists"),
        ({"key": "a", "on_conflict": "replace"}, "replaced"),
        (short, "created"),
        (short, "exists"),
    ]
    try:
        for options, happened in said:
            assert await enqueued_by(service, publisher, **options) == happened, options
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET state = 'failed', unique_until = now()"))
        assert await enqueued_by(service, publisher, **short) == "created"
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.job SET expires_at = now() WHERE state = 'queued'"))
        assert await enqueued_by(service, publisher, **short) == "created"
    finally:
        await service.dispose()


async def enqueued_by(service: AsyncEngine, publisher: Publisher, **options: Any) -> str:
    async with AsyncSession(service, info=publisher.info) as session, session.begin():
        return (await jobs.note.options(**options).enqueue(session, "from a service")).happened


@pytest.mark.leaves_hints
async def test_a_services_role_needs_no_grant_for_keys_to_enqueue_without_one(
    engine: AsyncEngine, database_url: str, suffix: str, publisher: Publisher
) -> None:
    role = f"exarq_service{suffix}"
    async with engine.begin() as connection:
        await connection.execute(text(f"REVOKE ALL ON exarq.job FROM {role}"))
        await connection.execute(text(f"GRANT INSERT, SELECT (id, run_at, enqueued_at) ON exarq.job TO {role}"))
    service = create_async_engine(address(database_url, role))
    try:
        assert await enqueued_by(service, publisher, priority=1, expires=60) == "created"
    finally:
        await service.dispose()


async def test_the_role_for_enqueueing_by_sql_suffices_where_no_migration_has_made_it(
    engine: AsyncEngine, suffix: str
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("REVOKE ALL ON FUNCTION exarq.enqueue FROM exarq_enqueue"))
        await connection.execute(text(f"SET LOCAL ROLE exarq_enqueue{suffix}"))
        job = (await connection.execute(text("SELECT exarq.enqueue('tests.noop')"))).scalar_one()

    assert await state(engine, job) == "queued"
    async with engine.connect() as connection:
        await connection.execute(text(f"SET ROLE exarq_enqueue{suffix}"))
        with pytest.raises(DBAPIError, match="permission denied"):
            await connection.execute(text("SELECT FROM exarq.job"))


async def test_a_readers_role_sees_jobs_and_changes_none(
    engine: AsyncEngine, database_url: str, suffix: str, publisher: Publisher
) -> None:
    job = await a_job(engine)
    reader = create_async_engine(address(database_url, f"exarq_reader{suffix}"))
    try:
        assert (await row(reader, job)).name == "tests.noop"
        assert await attempts(reader, job) == []
        for statement in ("UPDATE exarq.job SET queue = 'x'", "INSERT INTO exarq.attempt DEFAULT VALUES"):
            assert await refused(reader, statement)
    finally:
        await reader.dispose()


async def _are(engine: AsyncEngine, ids: list[Any], wanted: str | None) -> bool:
    return {await state(engine, job_id) for job_id in ids} == {wanted}
