"""Enqueue → publish → claim → run → complete, on real servers."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.support import run_all, state
from worker.core.registry import Registry
from worker.flow.job import JobFunction
from worker.settings import Settings


async def test_a_job_runs_once_and_its_writes_and_result_are_kept(
    engine: AsyncEngine, sessions: async_sessionmaker[AsyncSession], settings: Settings
) -> None:
    registry = Registry()

    async def note(session: AsyncSession, word: str) -> int:
        await session.execute(text("INSERT INTO note VALUES (:word)"), {"word": word})
        return len(word)

    noted = JobFunction(note, name="tests.note")
    registry.register(noted)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE note (word text)"))

    async with sessions.begin() as session:
        handle = await noted.enqueue(session, "hello")
    await run_all(settings, registry)

    assert await state(engine, handle.id) == "succeeded"
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT word FROM note"))).scalars().all() == ["hello"]
