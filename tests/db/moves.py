"""Rows to move, and every move that a worker makes with its token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.support import a_job
from worker.core.outcome import ErrorText
from worker.core.states import JobState
from worker.db import transitions
from worker.db.failures import is_contention
from worker.db.ids import uuid7
from worker.db.send import Send
from worker.db.transitions import Held, Moved

ERROR = ErrorText("ValueError", "no such word", "Traceback: line 1")
MINUTE = timedelta(minutes=1)

Verb = Callable[[AsyncConnection, Held], Awaitable[Any]]


async def succeed(connection: AsyncConnection, held: Held) -> bool:
    return await connection.run_sync(transitions.succeed, held, '{"a": 1}')


async def succeed_many(connection: AsyncConnection, held: Held) -> Any:
    return await transitions.succeed_many(connection, {held: "1"})


async def retry(connection: AsyncConnection, held: Held) -> Moved | None:
    return await transitions.retry(connection, held, ERROR, wait=MINUTE, counts=True)


async def fail(connection: AsyncConnection, held: Held) -> Moved | None:
    return await transitions.fail(connection, held, ERROR)


async def cancel(connection: AsyncConnection, held: Held) -> Moved | None:
    return await transitions.cancel(connection, held, "not wanted")


async def snooze(connection: AsyncConnection, held: Held) -> Moved | None:
    return await transitions.snooze(connection, held, MINUTE)


async def release(connection: AsyncConnection, held: Held) -> Moved | None:
    return await transitions.release(connection, held, "stopped", wait=MINUTE)


async def release_many(connection: AsyncConnection, held: Held) -> Any:
    return await transitions.release_many(connection, [held], "stopped")


async def unless_locked(sent: Awaitable[Any]) -> Any:
    """What it answers; None where it fails because another transaction holds the row."""
    try:
        return await sent
    except DBAPIError as error:
        if not is_contention(error):
            raise
        return None


LEAVING: list[Verb] = [retry, fail, cancel, snooze, release, release_many]
VERBS: list[Verb] = [succeed, succeed_many, *LEAVING]


async def a_held_job(engine: AsyncEngine, **columns: Any) -> Held:
    held = Held(uuid7(), uuid4())
    await a_job(engine, **{"id": held.job_id, "token": held.token, "state": JobState.RUNNING, **columns})
    return held


async def send(engine: AsyncEngine, call: Send[Any]) -> Any:
    """Send in a transaction of its own."""
    async with engine.begin() as connection:
        return await call(connection)
