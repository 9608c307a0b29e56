"""What a worker opens at start, in order, and closes in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, Final

from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.core.registry import Registry
from worker.db import reads, workers
from worker.db.engine import jobs_engine, processor_engine
from worker.db.ids import uuid7
from worker.db.migrate import require_migrated
from worker.db.send import once
from worker.db.session import make_sessions
from worker.db.unreachable import database_errors
from worker.flow import complete
from worker.flow.flush import Flusher
from worker.flow.holdings import Holdings, Run
from worker.flow.publish import Publisher
from worker.flow.work import Counts, Identity, Work
from worker.settings import Settings

# Claims, flushes, completions and upkeep; the heartbeat has one more of its own.
_OWN_CONNECTIONS: Final = 4
_CLOSE_LIMIT: Final = timedelta(seconds=2)


@asynccontextmanager
async def open_work(
    settings: Settings, database_url: str, redis: ArqRedis, registry: Registry, context: dict[str, Any]
) -> AsyncIterator[Work]:
    """The worker's parts, while the block lasts; its row exists from here on.

    Raises: `DatabaseUnreachable`, `SchemaNotMigrated`.
    """
    identity = Identity(uuid7())
    async with AsyncExitStack() as stack:
        processor = open_processor_engine(settings, database_url, identity, connections=_OWN_CONNECTIONS)
        stack.push_async_callback(_dispose, processor)
        engine = jobs_engine(
            database_url,
            application_name=lambda: identity.application_name,
            connections=settings.worker.concurrency,
            connect_timeout=settings.database.connect_timeout,
        )
        stack.push_async_callback(_dispose, engine)
        publisher = Publisher(redis, lease=settings.worker.lease)
        stack.push_async_callback(publisher.close)
        holdings = Holdings()
        installation = await _introduce(processor, settings, identity, database_url)

        async def reject(run: Run, error: Exception) -> None:
            await complete.reject(work, run, error)

        flusher = Flusher(
            processor,
            stored=lambda run: complete.succeeded(work, run),
            lost=lambda run: complete.lease_lost(work, run),
            rejected=reject,
        )
        stack.push_async_callback(flusher.close)
        work = Work(
            settings=settings,
            registry=registry,
            identity=identity,
            installation=installation,
            jobs_engine=engine,
            sessions=make_sessions(engine, publisher.info),
            processor=processor,
            publisher=publisher,
            holdings=holdings,
            flusher=flusher,
            counts=Counts(),
            context=context,
        )
        yield work


def open_processor_engine(
    settings: Settings, database_url: str, identity: Identity, *, connections: int
) -> AsyncEngine:
    """An engine for Exarq's own statements, as this worker."""
    return processor_engine(
        database_url,
        application_name=lambda: identity.application_name,
        connections=connections,
        connect_timeout=settings.database.connect_timeout,
        statement_timeout=settings.database.statement_timeout,
    )


async def _dispose(engine: AsyncEngine) -> None:
    """Close the pooled connections; a server that does not answer keeps nobody from going."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_LIMIT.total_seconds()):
            await engine.dispose()


async def _introduce(processor: AsyncEngine, settings: Settings, identity: Identity, database_url: str) -> Any:
    """Check the schema, register the worker, and learn which installation this is."""

    async def send(connection: AsyncConnection) -> Any:
        await require_migrated(connection)
        installation = await reads.installation_id(connection)
        await workers.register(
            connection, identity.id, queues=settings.worker.queues, concurrency=settings.worker.concurrency
        )
        return installation

    with database_errors(database_url):
        return await once(processor, send)
