"""Send a statement of Exarq's own until PostgreSQL has answered it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential, wait_random

from worker.db.failures import is_transient
from worker.observe.events import StepFailed, emit

T = TypeVar("T")
Send = Callable[[AsyncConnection], Awaitable[T]]
Fetch = Callable[[AsyncConnection, Executable, Mapping[str, Any]], Awaitable[Sequence[Any]]]


async def fetch(connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Any]:
    """The rows of a statement."""
    return (await connection.execute(statement, parameters)).all()


async def once(engine: AsyncEngine, send: Send[T]) -> T:
    """Send on a connection in AUTOCOMMIT: a single statement is a transaction of its own, in one round trip."""
    async with engine.connect() as connection:
        return await send(await connection.execution_options(isolation_level="AUTOCOMMIT"))


async def until_answered(engine: AsyncEngine, send: Send[T]) -> T:
    """Send again, on another connection, for as long as the answer is lost; `send` must be safe to repeat."""
    again = AsyncRetrying(
        retry=retry_if_exception(is_transient),
        wait=wait_exponential(multiplier=0.05, max=2.0) + wait_random(0, 0.1),
        before_sleep=_tell,
        reraise=True,
    )
    return await again(once, engine, send)


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    emit(StepFailed(step="ask PostgreSQL", error=f"{type(error).__name__}: {error}"))
