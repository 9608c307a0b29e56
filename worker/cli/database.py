"""The database of a command that is no worker, and what to say when it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from worker.addresses import database_url
from worker.db.engine import jobs_engine, processor_engine
from worker.db.migrate import require_migrated
from worker.db.unreachable import database_errors
from worker.settings import Settings

_NAME: Final = "exarq command"


@asynccontextmanager
async def migrated_database(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """An engine for short statements on tables that are as this version needs them.

    Raises: `DatabaseUnreachable`, `SchemaNotMigrated`.
    """
    url = database_url(settings)
    engine = processor_engine(
        url,
        application_name=lambda: _NAME,
        connections=1,
        connect_timeout=settings.database.connect_timeout,
        statement_timeout=settings.database.statement_timeout,
        pooler=settings.database.pooler,
    )
    with database_errors(url):
        try:
            async with engine.connect() as connection:
                await require_migrated(connection)
            yield engine
        finally:
            await engine.dispose()


@asynccontextmanager
async def database(settings: Settings, url: str | None = None) -> AsyncIterator[AsyncEngine]:
    """An engine whose statements may take their time, whatever the tables are like.

    Raises: `DatabaseUnreachable`.
    """
    url = url or database_url(settings)
    engine = jobs_engine(
        url,
        application_name=lambda: _NAME,
        connections=1,
        connect_timeout=settings.database.connect_timeout,
        pooler=settings.database.pooler,
    )
    with database_errors(url):
        try:
            yield engine
        finally:
            await engine.dispose()
