"""Attempts without the worker around them, and what they wrote."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.db.session_cases import Body
from worker.db.transitions import Held
from worker.flow.attempt import Attempt
from worker.flow.work import Work


@asynccontextmanager
async def an_attempt(work: Work) -> AsyncIterator[Attempt]:
    attempt = Attempt(work)
    try:
        yield attempt
    finally:
        await attempt.close()


async def run(work: Work, held: Held, body: Body) -> bool:
    async with an_attempt(work) as attempt:
        await body(attempt.session())
        return await attempt.commit_success(held, "1")


async def words(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as connection:
        return set((await connection.execute(text("SELECT word FROM note"))).scalars())


async def kept_by_plain_sqlalchemy(engine: AsyncEngine, body: Body) -> set[str]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        await body(session)
        await session.commit()
    kept = await words(engine)
    async with engine.begin() as connection:
        await connection.execute(text("TRUNCATE note"))
    return kept


async def ask(engine: AsyncEngine, query: str) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(text(query))).scalar()
