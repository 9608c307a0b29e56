"""Migrations on a database of their own: the schema equals the models, and nobody is kept waiting."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from importlib import import_module
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests.servers import TestServers
from tests.support import until
from worker.core.errors import SchemaNotMigrated
from worker.db import migrate
from worker.db.migrate import MigrationBlocked, require_migrated, revisions, upgrade
from worker.db.models import SCHEMA, Base, Job


@pytest.fixture
async def empty(servers: TestServers) -> AsyncIterator[AsyncEngine]:
    """An engine on a database without our schema."""
    name = f"exarq_test_empty_{os.getpid()}"
    servers.sql(f"CREATE DATABASE {name}")
    engine = create_async_engine(servers.admin_url.set(database=name))
    try:
        yield engine
    finally:
        await engine.dispose()
        servers.sql(f"DROP DATABASE {name} WITH (FORCE)")


_ENQUEUE = " FROM pg_proc WHERE pronamespace = 'exarq'::regnamespace AND proname = 'enqueue'"


async def inspected(engine: AsyncEngine, look: Callable[[Connection], Any]) -> Any:
    async with engine.connect() as connection:
        return await connection.run_sync(look)


def downgrade(connection: Connection) -> None:
    config = migrate._config()
    config.attributes["connection"] = connection
    command.downgrade(config, "base")


def differences(connection: Connection) -> Any:
    options = {"include_schemas": True, "include_name": _ours, "compare_server_default": True, "compare_type": True}
    context = MigrationContext.configure(connection, opts={**options, "version_table_schema": SCHEMA})
    return compare_metadata(context, Base.metadata)


def _ours(name: str | None, type_: str, _: Any) -> bool:
    return type_ != "schema" or name == SCHEMA


async def value(engine: AsyncEngine, query: str) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(text(query))).scalar()


async def set_revision(engine: AsyncEngine, revision: str) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE exarq.alembic_version SET version_num = '{revision}'"))


# ── the schema ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_migrated_schema_equals_the_models(engine: AsyncEngine) -> None:
    found = await inspected(engine, differences)

    assert found == []


async def test_tables_indexes_and_storage_are_those_that_the_models_would_create(
    engine: AsyncEngine, empty: AsyncEngine
) -> None:
    async with empty.begin() as connection:
        await connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
        await connection.run_sync(Base.metadata.create_all)
    indexes = "SELECT string_agg(indexdef, '; ' ORDER BY indexname) FROM pg_indexes WHERE schemaname = 'exarq' AND tablename <> 'alembic_version'"
    checks = "SELECT string_agg(conname || pg_get_constraintdef(oid), '; ' ORDER BY conname) FROM pg_constraint WHERE conrelid::regclass::text LIKE 'exarq.%' AND conrelid <> coalesce(to_regclass('exarq.alembic_version'), 0::oid::regclass)"
    options = "SELECT string_agg(relname || array_to_string(reloptions, ','), '; ' ORDER BY relname) FROM pg_class WHERE relnamespace = 'exarq'::regnamespace AND relkind = 'r'"

    for query in (indexes, checks, options):
        migrated, modelled = await value(engine, query), await value(empty, query)

        assert migrated == modelled
        assert migrated is not None


async def test_a_job_has_four_indexes_and_one_each_that_only_unique_and_only_adopted_jobs_are_in(
    engine: AsyncEngine,
) -> None:
    count = await value(engine, "SELECT count(*) FROM pg_indexes WHERE schemaname = 'exarq' AND tablename = 'job'")

    assert count == 6


async def test_nothing_references_a_job_by_a_foreign_key(engine: AsyncEngine) -> None:
    count = await value(engine, "SELECT count(*) FROM pg_constraint WHERE confrelid = 'exarq.job'::regclass")

    assert count == 0
    assert not Job.__table__.foreign_keys


async def test_vacuum_goes_by_numbers_of_rows(engine: AsyncEngine) -> None:
    options = await value(engine, "SELECT reloptions FROM pg_class WHERE oid = 'exarq.job'::regclass")

    assert {"fillfactor=85", "autovacuum_vacuum_scale_factor=0", "autovacuum_vacuum_threshold=5000"} <= set(options)


# ── the upgrade ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_upgrade_makes_the_schema_and_says_where_it_was(empty: AsyncEngine) -> None:
    before = await upgrade(empty)
    again = await upgrade(empty)

    assert before.current is None
    assert again.up_to_date
    assert await inspected(empty, differences) == []
    assert await value(empty, "SELECT count(*) FROM exarq.installation") == 1


async def test_a_downgrade_takes_everything_back_and_an_upgrade_makes_it_anew(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(downgrade)
    left = await value(engine, "SELECT string_agg(tablename, ',') FROM pg_tables WHERE schemaname = 'exarq'")

    await upgrade(engine)

    assert left == "alembic_version"
    assert await inspected(engine, differences) == []


async def test_upgrades_at_the_same_time_all_succeed_and_one_does_the_work(empty: AsyncEngine) -> None:
    found = await asyncio.gather(*[upgrade(empty) for _ in range(4)])

    assert [before.current for before in found].count(None) == 1
    assert await inspected(empty, differences) == []


async def test_an_upgrade_gives_way_to_a_long_lock_and_succeeds_after_it(engine: AsyncEngine) -> None:
    tries: list[str] = []
    async with engine.begin() as connection:
        await connection.run_sync(downgrade)
    event.listen(engine.sync_engine, "begin", lambda _: tries.append("begin"))

    async with engine.connect() as blocker:
        await blocker.execute(text("LOCK TABLE exarq.alembic_version IN ACCESS EXCLUSIVE MODE"))
        tries.clear()
        migrating = asyncio.create_task(upgrade(engine, lock_timeout_ms=50))
        await until(lambda: len(tries) >= 3, "it tries again")
        still_at_it = not migrating.done()
    await migrating

    assert still_at_it
    async with engine.connect() as connection:
        await require_migrated(connection)


async def test_an_upgrade_waits_for_a_lock_no_longer_than_its_limit(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(downgrade)

    async with engine.connect() as blocker:
        await blocker.execute(text("LOCK TABLE exarq.alembic_version IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(MigrationBlocked, match=r"3 tries.*pg_stat_activity"):
            await upgrade(engine, tries=3, lock_timeout_ms=20)

    assert await value(engine, "SELECT to_regclass('exarq.job')") is None


async def test_an_upgrade_needs_no_more_than_its_schema(empty: AsyncEngine) -> None:
    role = f"exarq_test_role_{os.getpid()}"
    async with empty.begin() as connection:
        await connection.execute(text(f"CREATE ROLE {role}"))
        await connection.execute(text("REVOKE CREATE ON SCHEMA public FROM public"))
        await connection.execute(text(f"CREATE SCHEMA {SCHEMA} AUTHORIZATION {role}"))
    modest = create_async_engine(empty.url, connect_args={"server_settings": {"role": role}})
    try:
        await upgrade(modest)

        assert await value(modest, "SELECT current_user") == role
        assert await value(modest, "SELECT count(*) FROM exarq.job") == 0
        assert await value(modest, "SELECT has_function_privilege('exarq_enqueue', oid, 'EXECUTE')" + _ENQUEUE)
    finally:
        await modest.dispose()
        async with empty.begin() as connection:
            await connection.execute(text(f"DROP OWNED BY {role} CASCADE"))
            await connection.execute(text(f"DROP ROLE {role}"))


async def test_who_may_make_no_role_migrates_without_it(empty: AsyncEngine) -> None:
    role = f"exarq_test_modest_{os.getpid()}"
    make = import_module("worker.db.migrations.versions.0003_sql_enqueue")._MAKE_ROLE.replace(
        "exarq_enqueue", "exarq_nobody"
    )
    async with empty.begin() as connection:
        await connection.execute(text(f"CREATE ROLE {role}"))
        await connection.execute(text(f"SET LOCAL ROLE {role}"))

        await connection.execute(text(make))

        assert (await connection.execute(text("SELECT to_regrole('exarq_nobody')"))).scalar() is None
        await connection.rollback()


# ── the check at the start ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_migrated_database_passes_the_check(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await require_migrated(connection)

        assert (await revisions(connection)).up_to_date


async def test_a_database_without_the_schema_is_told_to_upgrade(empty: AsyncEngine) -> None:
    async with empty.connect() as connection:
        with pytest.raises(SchemaNotMigrated, match=r"no exarq schema yet; run `exarq db upgrade`"):
            await require_migrated(connection)


@pytest.mark.parametrize("other", ["0000", "9999_newer"])
async def test_another_revision_is_named_and_told_to_upgrade(engine: AsyncEngine, other: str) -> None:
    await set_revision(engine, other)

    async with engine.connect() as connection:
        needs = rf"is at {other}, this version needs {migrate.HEAD}; run `exarq db upgrade`"
        with pytest.raises(SchemaNotMigrated, match=needs):
            await require_migrated(connection)


async def test_an_upgrade_of_a_schema_that_is_newer_than_this_version_says_so(engine: AsyncEngine) -> None:
    await set_revision(engine, "9999_newer")

    with pytest.raises(SchemaNotMigrated, match=r"9999_newer.*newest version"):
        await upgrade(engine)

    assert await value(engine, "SELECT version_num FROM exarq.alembic_version") == "9999_newer"


def test_the_revision_this_version_needs_is_the_newest_there_is() -> None:
    scripts = ScriptDirectory.from_config(migrate._config())

    assert scripts.get_heads() == [migrate.HEAD]
