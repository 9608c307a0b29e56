"""Sessions whose work is rolled back when the test ends."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from worker.flow.publish import Publishable, Publisher
from worker.flow.waiting import Waiting


class NoHints(Publisher):
    """A publisher that publishes nothing, for tests without a Redis: `async_sessionmaker(…, info=NoHints().info)`."""

    def __init__(self) -> None:
        """Needs no client: who waits for a job looks at its row."""
        self._hears = None
        self._waitings: dict[AbstractEventLoop, Waiting] = {}

    def publish(self, hints: Iterable[Publishable]) -> None:
        """Drop these: they would be of jobs that a test rolls back, or drains itself."""

    async def flush(self) -> None:
        """Nothing is ever on its way."""

    async def close(self) -> None:
        """Nothing is open but what waits."""
        await self._end_waits()


@asynccontextmanager
async def rolled_back(engine: AsyncEngine) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """A session factory on one connection whose transaction is rolled back at the end, whatever its sessions commit.

    Args:
        engine: the engine of the test's database.

    """
    async with engine.connect() as connection:
        await connection.begin()
        yield async_sessionmaker(
            connection, expire_on_commit=False, join_transaction_mode="create_savepoint", info=NoHints().info
        )
        await connection.rollback()
