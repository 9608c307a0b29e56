"""Statements of Exarq's own: sent again until they are answered, and only where that is the remedy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.db.moves import a_held_job, succeed
from tests.support import until
from worker.db import reads
from worker.db.engine import processor_engine
from worker.db.send import once, until_answered
from worker.db.transitions import Held


@pytest.fixture
async def processor(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = processor_engine(
        database_url,
        application_name=lambda: "exarq test",
        connections=2,
        connect_timeout=timedelta(seconds=5),
        statement_timeout=timedelta(seconds=3),
    )
    yield engine
    await engine.dispose()


async def test_a_statement_sent_once_is_a_transaction_of_its_own(processor: AsyncEngine, engine: AsyncEngine) -> None:
    async def create(connection: AsyncConnection) -> None:
        await connection.execute(text("CREATE TABLE made ()"))

    await once(processor, create)

    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT to_regclass('made')"))).scalar() is not None


async def test_a_send_whose_backend_was_terminated_is_sent_again(processor: AsyncEngine, engine: AsyncEngine) -> None:
    pids: list[Any] = []

    async def send(connection: AsyncConnection) -> str:
        pids.append((await connection.execute(text("SELECT pg_backend_pid()"))).scalar())
        if len(pids) < 3:
            async with engine.connect() as other:
                await other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pids[-1]})
        return str((await connection.execute(text("SELECT 'answered'"))).scalar())

    answer = await until_answered(processor, send)

    assert answer == "answered"
    assert len(set(pids)) == 3


@pytest.mark.parametrize(
    ("statement", "parameters"), [("SELECT 1/0", {}), ("SELECT CAST(:number AS integer)", {"number": "seven"})]
)
async def test_a_send_that_would_fail_again_is_not_repeated(
    processor: AsyncEngine, statement: str, parameters: dict[str, Any]
) -> None:
    sent: list[int] = []

    async def send(connection: AsyncConnection) -> None:
        sent.append(1)
        await connection.execute(text(statement), parameters)

    with pytest.raises(DBAPIError):
        await asyncio.wait_for(until_answered(processor, send), 30)

    assert len(sent) == 1


@pytest.mark.leaves_running
@pytest.mark.parametrize("commits", [True, False])
async def test_the_last_word_on_a_job_waits_for_the_zombie_that_may_still_commit(
    processor: AsyncEngine, engine: AsyncEngine, commits: bool
) -> None:
    held = await a_held_job(engine)
    asked: list[int] = []

    async def ask(connection: AsyncConnection) -> bool:
        asked.append(1)
        return await reads.has_succeeded_with(connection, held)

    async with engine.connect() as zombie:
        await succeed(zombie, held)
        asking = asyncio.create_task(until_answered(processor, ask))
        await until(lambda: len(asked) >= 3, "the lock timeout made it ask again")
        answered_early = asking.done()
        await (zombie.commit() if commits else zombie.rollback())

    assert not answered_early
    assert await asking is commits
    stale = Held(held.job_id, uuid4())
    assert not await once(processor, lambda connection: reads.has_succeeded_with(connection, stale))
