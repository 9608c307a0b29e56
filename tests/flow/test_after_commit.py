"""Hints leave after the outermost commit, and only those of what was committed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.support import state
from worker.broker.hints import Hint
from worker.flow.enqueue import enqueue
from worker.flow.publish import PUBLISHER, Publishable, Publisher


class Recorder(Publisher):
    """Remembers what it was told to publish, and sends nothing."""

    def __init__(self) -> None:
        self.told: list[Hint] = []

    def publish(self, hints: Iterable[Publishable]) -> None:
        self.told += [hint for hint in hints if isinstance(hint, Hint)]

    @property
    def ids(self) -> list[UUID]:
        return [hint.job_id for hint in self.told]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def sessions(engine: AsyncEngine, recorder: Recorder) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, info={PUBLISHER: recorder})


Sessions = async_sessionmaker[AsyncSession]


async def a(session: AsyncSession, **options: Any) -> UUID:
    return (await enqueue(session, "tests.noop", **options)).id


async def test_hints_leave_with_the_commit_and_not_before(sessions: Sessions, recorder: Recorder) -> None:
    async with sessions() as session:
        job = await a(session)
        await session.flush()
        before = recorder.ids
        await session.commit()

    assert (before, recorder.ids) == ([], [job])


async def test_a_savepoints_release_publishes_nothing_and_the_commit_all(
    sessions: Sessions, recorder: Recorder
) -> None:
    async with sessions() as session:
        first = await a(session)
        async with session.begin_nested():
            second = await a(session)
            async with session.begin_nested():
                third = await a(session)
        released = recorder.ids
        await session.commit()

    assert (released, recorder.ids) == ([], [first, second, third])


async def test_a_commit_inside_a_savepoint_publishes_once(sessions: Sessions, recorder: Recorder) -> None:
    async with sessions() as session:
        await session.begin_nested()
        job = await a(session)
        await session.commit()

    assert recorder.ids == [job]


async def test_a_savepoints_rollback_forgets_its_hints_and_those_released_inside_it(
    engine: AsyncEngine, sessions: Sessions, recorder: Recorder
) -> None:
    async with sessions() as session:
        kept = await a(session)
        outer = await session.begin_nested()
        lost = [await a(session)]
        async with session.begin_nested():
            lost.append(await a(session))
        await outer.rollback()
        later = await a(session)
        await session.commit()

    assert recorder.ids == [kept, later]
    assert [await state(engine, job) for job in lost] == [None, None]


async def test_a_session_used_again_after_a_rollback_publishes_only_the_new(
    sessions: Sessions, recorder: Recorder
) -> None:
    async with sessions() as session:
        await a(session)
        await session.rollback()
        second = await a(session)
        await session.commit()
        await session.commit()
        third = await a(session)
        await session.commit()

    assert recorder.ids == [second, third]


async def test_a_closed_session_forgets_what_it_did_not_commit(sessions: Sessions, recorder: Recorder) -> None:
    session = sessions()
    await a(session)
    await session.close()
    job = await a(session)
    await session.commit()
    await session.close()

    assert recorder.ids == [job]


async def test_a_failed_commit_publishes_nothing(engine: AsyncEngine, sessions: Sessions, recorder: Recorder) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE once (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))

    async with sessions() as session:
        await session.execute(text("INSERT INTO once VALUES (1), (1)"))
        job = await a(session)
        with pytest.raises(Exception, match="duplicate key"):
            await session.commit()
        await session.rollback()
        await session.commit()

    assert recorder.ids == []
    assert await state(engine, job) is None


@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only", "conditional_savepoint"])
async def test_a_session_joined_to_an_outer_transaction_publishes_nothing(
    engine: AsyncEngine, recorder: Recorder, mode: Any
) -> None:
    async with engine.connect() as connection:
        outer = await connection.begin()
        session = AsyncSession(connection, join_transaction_mode=mode, info={PUBLISHER: recorder})
        job = await a(session)
        await session.commit()
        await session.close()
        await outer.commit()

    assert recorder.ids == []
    assert await state(engine, job) == "queued"  # reconcile finds it


async def test_a_session_on_a_connection_without_a_transaction_publishes_at_its_commit(
    engine: AsyncEngine, recorder: Recorder
) -> None:
    async with engine.connect() as connection, AsyncSession(connection, info={PUBLISHER: recorder}) as session:
        job = await a(session)
        await session.commit()

    assert recorder.ids == [job]


async def test_a_job_due_later_than_the_horizon_is_left_to_reconcile(sessions: Sessions, recorder: Recorder) -> None:
    async with sessions.begin() as session:
        soon = await a(session, delay=timedelta(seconds=29))
        await a(session, delay=timedelta(seconds=31))

    assert recorder.ids == [soon]


async def test_a_hints_delay_does_not_start_anew_at_the_commit(sessions: Sessions, recorder: Recorder) -> None:
    began = time.monotonic()
    async with sessions.begin() as session:
        await a(session, delay=5)
        await session.execute(text("SELECT pg_sleep(0.3)"))
    took = time.monotonic() - began

    (hint,) = recorder.told
    assert 5 - took <= hint.due_at - time.monotonic() < 4.75


async def test_a_publisher_bound_later_gets_the_hints_from_then_on(sessions: Sessions, recorder: Recorder) -> None:
    another = Recorder()

    async with sessions() as session:
        first = await a(session)
        await session.commit()
        session.info[PUBLISHER] = another
        second = await a(session)
        await session.commit()

    assert (recorder.ids, another.ids) == ([first], [second])
