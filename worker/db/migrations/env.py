"""Run by Alembic: on the connection that `worker.db.migrate` hands in, else on the configured database."""

from __future__ import annotations

import asyncio
from typing import Any

from alembic import context
from sqlalchemy import Connection, pool
from sqlalchemy.ext.asyncio import create_async_engine

from worker.db.models import SCHEMA, Base


def _own_schema_only(name: str | None, type_: str, _parents: Any) -> bool:
    return type_ != "schema" or name == SCHEMA


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table_schema=SCHEMA,
        include_schemas=True,
        include_name=_own_schema_only,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        context.run_migrations()


async def _connect_and_run() -> None:
    from worker.settings import load_settings

    engine = create_async_engine(load_settings().require_database_url(), poolclass=pool.NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(_run)
        await connection.commit()


def _write_sql() -> None:
    context.configure(
        dialect_name="postgresql",
        target_metadata=Base.metadata,
        version_table_schema=SCHEMA,
        literal_binds=True,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        context.execute("SET LOCAL lock_timeout = '1s'")
        context.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        context.run_migrations()


given = context.config.attributes.get("connection")
if context.is_offline_mode():
    _write_sql()
elif given is not None:
    _run(given)
else:
    asyncio.run(_connect_and_run())
