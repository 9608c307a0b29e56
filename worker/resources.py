"""What a worker opens at start, in order, and closes in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID

from arq.connections import ArqRedis
from arq.jobs import Deserializer, Serializer
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from worker.broker.payloads import Payloads
from worker.core.objects import load_callable
from worker.core.registry import Registry
from worker.db import reads, workers
from worker.db.engine import FOR_SECOND_SESSIONS, jobs_engine, processor_engine
from worker.db.ids import uuid7
from worker.db.kept import Kept
from worker.db.migrate import require_migrated
from worker.db.send import once
from worker.db.session import make_sessions
from worker.db.unreachable import database_errors
from worker.db.user_sessions import UserSessions
from worker.flow import complete
from worker.flow.awaited import Awaited
from worker.flow.flush import Flusher
from worker.flow.holdings import Holdings, Run
from worker.flow.mirror import Mirror
from worker.flow.progress import Reports
from worker.flow.publish import Publisher
from worker.flow.work import Counts, Identity, Work
from worker.observe.events import PicklesTrusted, PoolTooSmall, emit
from worker.settings import JobsSettings, Settings

# One is kept for claims; flushes, completions and upkeep, each short, wait for one another at three.
_OWN_CONNECTIONS: Final = 4
HEARTBEAT_CONNECTIONS: Final = 2
_RELAY_CONNECTIONS: Final = 1
_CLOSE_LIMIT: Final = timedelta(seconds=2)


def connections_of(concurrency: int) -> int:
    """How many connections to PostgreSQL a worker may open."""
    return concurrency + FOR_SECOND_SESSIONS + _OWN_CONNECTIONS + HEARTBEAT_CONNECTIONS + _RELAY_CONNECTIONS


@asynccontextmanager
async def open_work(
    settings: Settings,
    database_url: str,
    redis: ArqRedis,
    registry: Registry,
    context: dict[str, Any],
    payloads: Payloads | None = None,
) -> AsyncIterator[Work]:
    """The worker's parts, while the block lasts; its row exists from here on.

    `payloads` reads what plain ARQ's clients enqueue; without it, JSON and plain data.

    Raises: `DatabaseUnreachable`, `SchemaNotMigrated`, and `SettingsError` for what `database.sessions` names.
    """
    identity = Identity(uuid7())
    async with AsyncExitStack() as stack:
        processor = open_processor_engine(settings, database_url, identity, connections=_OWN_CONNECTIONS)
        stack.push_async_callback(_dispose, processor)
        claims = Kept(processor, lambda: identity.application_name)
        stack.push_async_callback(claims.close)
        publisher = Publisher(redis, lease=settings.worker.lease)
        stack.push_async_callback(publisher.close)
        holdings = Holdings()
        installation = await _installation(processor, database_url)
        sessions = await _open_sessions(stack, settings, database_url, identity, publisher.info, installation)

        async def reject(run: Run, error: Exception) -> None:
            await complete.reject(work, run, error)

        flusher = Flusher(
            processor,
            stored=lambda run: complete.succeeded(work, run),
            lost=lambda run: complete.lease_lost(work, run),
            rejected=reject,
        )
        stack.push_async_callback(flusher.close)
        reports = Reports(processor)
        stack.push_async_callback(reports.close)
        mirror = Mirror(redis, processor, payloads or Payloads(), settings.worker.lease, publisher.publish)
        stack.push_async_callback(mirror.close)
        work = Work(
            settings=settings,
            registry=registry,
            identity=identity,
            installation=installation,
            jobs_engine=sessions.kw["bind"],
            sessions=sessions,
            processor=processor,
            claims=claims,
            publisher=publisher,
            holdings=holdings,
            flusher=flusher,
            awaited=Awaited(publisher.publish),
            reports=reports,
            mirror=mirror,
            counts=Counts(),
            context=context,
        )
        with database_errors(database_url):
            await once(processor, partial(_register, settings=settings, identity=identity))
        yield work


def payloads_of(
    jobs: JobsSettings, serializer: Serializer | None = None, deserializer: Deserializer | None = None
) -> Payloads:
    """What reads plain ARQ's payloads: the given functions, else what the settings name, else JSON and pickles.

    Raises: `ModuleNotLoaded`, `SettingsError` where a name leads nowhere.
    """
    return Payloads(
        serializer or load_callable("jobs.arq_serializer", jobs.arq_serializer),
        deserializer or load_callable("jobs.arq_deserializer", jobs.arq_deserializer),
        pickles=jobs.arq_pickles,
        warn=lambda: emit(PicklesTrusted()),
    )


async def _open_sessions(
    stack: AsyncExitStack,
    settings: Settings,
    database_url: str,
    identity: Identity,
    info: dict[str, Any],
    installation: UUID,
) -> async_sessionmaker[AsyncSession]:
    """The jobs' sessions and their engine: ours, or what `database.sessions` makes."""
    name = settings.database.sessions
    make = load_callable("database.sessions", name)
    if name is None or make is None:
        engine = jobs_engine(
            database_url,
            application_name=lambda: identity.application_name,
            connections=settings.worker.concurrency,
            connect_timeout=settings.database.connect_timeout,
            pooler=settings.database.pooler,
            hide_parameters=settings.database.hide_parameters,
        )
        stack.push_async_callback(_dispose, engine)
        return make_sessions(engine, info)
    users = UserSessions(name, make, database_url)
    stack.push_async_callback(_dispose, users.engine)
    sessions, end = users.as_workers(lambda: identity.application_name, info, settings.database.pooler)
    stack.callback(end)
    with database_errors(database_url):
        await users.check(installation)
    if (room := users.room) is not None and room < settings.worker.concurrency:
        emit(PoolTooSmall(connections=room, concurrency=settings.worker.concurrency))
    return sessions


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
        pooler=settings.database.pooler,
    )


@asynccontextmanager
async def open_relay_engine(settings: Settings, database_url: str, identity: Identity) -> AsyncIterator[AsyncEngine]:
    """An engine for the one connection that listens, while the block lasts."""
    engine = open_processor_engine(settings, database_url, identity, connections=_RELAY_CONNECTIONS)
    try:
        yield engine
    finally:
        await _dispose(engine)


async def _dispose(engine: AsyncEngine) -> None:
    """Close the pooled connections; a server that does not answer keeps nobody from going."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_LIMIT.total_seconds()):
            await engine.dispose()


async def _installation(processor: AsyncEngine, database_url: str) -> UUID:
    """Check the schema, and learn which installation this is."""

    async def send(connection: AsyncConnection) -> UUID:
        await require_migrated(connection)
        return await reads.installation_id(connection)

    with database_errors(database_url):
        return await once(processor, send)


async def _register(connection: AsyncConnection, *, settings: Settings, identity: Identity) -> None:
    worker = settings.worker
    await workers.register(connection, identity.id, queues=worker.queues, concurrency=worker.concurrency)
