"""Commits of a job's own, against the matrix of what a job may do with its session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.db.attempts import kept_by_plain_sqlalchemy, words
from tests.db.moves import a_held_job
from tests.db.session_cases import CASES, Body
from tests.support import state
from worker.core.errors import LeaseLost
from worker.core.options import Rules
from worker.db.transitions import Held
from worker.flow.attempt import Attempt
from worker.flow.work import Work

pytestmark = [pytest.mark.leaves_running, pytest.mark.usefixtures("note_table")]


async def run(work: Work, held: Held, body: Body) -> bool:
    attempt = Attempt(work, held, Rules(commits="own"))
    try:
        await body(attempt.session())
        return await attempt.commit_success(held, "1")
    finally:
        await attempt.close()


async def test_an_attempt_keeps_what_plain_sqlalchemy_keeps_and_without_its_token_nothing(
    work: Work, engine: AsyncEngine
) -> None:
    for body in CASES:
        expected = await kept_by_plain_sqlalchemy(engine, body)
        held = await a_held_job(engine)
        if expected:
            with pytest.raises(LeaseLost):
                await run(work, Held(held.job_id, uuid4()), body)
        assert await words(engine) == set(), body.__name__

        committed = await run(work, held, body)

        assert await words(engine) == expected, body.__name__
        assert await state(engine, held.job_id) == ("succeeded" if committed else "running")
        async with engine.begin() as connection:
            await connection.execute(text("TRUNCATE note"))


class Base(DeclarativeBase):
    """The tables of these jobs."""


class Note(Base):
    """A word that a job writes."""

    __tablename__ = "note"

    word: Mapped[str] = mapped_column(primary_key=True)


async def test_what_the_last_commit_itself_cannot_write_is_the_error_that_is_told(
    work: Work, engine: AsyncEngine
) -> None:
    held = await a_held_job(engine)

    def before_commit(session: Session) -> None:
        session.add(Note(word="twice"))

    async def body(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO note VALUES ('twice')"))
        event.listen(session.sync_session, "before_commit", before_commit)

    with pytest.raises(IntegrityError, match="duplicate key"):
        await run(work, held, body)

    assert await words(engine) == set()


@asynccontextmanager
async def a_lost_connection(
    work: Work, engine: AsyncEngine
) -> AsyncIterator[tuple[Attempt, AsyncSession, AsyncConnection]]:
    """An attempt with a commit behind it whose connection is then lost: SQLAlchemy has another where it goes on."""
    attempt = Attempt(work, await a_held_job(engine), Rules(commits="own"))
    try:
        session = attempt.session()
        connection = await session.connection()
        await session.commit()
        await connection.invalidate()
        yield attempt, session, connection
    finally:
        await attempt.close()


async def test_what_a_job_left_on_the_driver_that_took_the_place_of_a_lost_one_reaches_no_other_job(
    work: Work, engine: AsyncEngine
) -> None:
    async with a_lost_connection(work, engine) as (_attempt, _session, connection):
        replaced: Any = (await connection.get_raw_connection()).driver_connection
        await replaced.add_listener("shop", lambda *_: None)

    assert replaced.is_closed()


async def test_the_driver_that_took_the_place_of_a_lost_one_is_asked_before_the_completion(
    work: Work, engine: AsyncEngine
) -> None:
    async with a_lost_connection(work, engine) as (attempt, session, connection):
        await connection.execute(text("SELECT 1"))  # begins a transaction that the session knows nothing of
        there = (await connection.get_raw_connection()).driver_connection

        found = await session.run_sync(lambda session: attempt.transaction.settle(session))

        assert found is not None
        assert found.connection.driver_connection is there is attempt.transaction._driver
