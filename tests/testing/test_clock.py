"""The frozen clock: PostgreSQL's time is what the test says, for all that Exarq and the user ask it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.testing.jobs_for_tests import fails_twice, write
from worker import Client
from worker.testing import assert_enqueued, drain, frozen_clock

NEW_YEAR = datetime(2031, 1, 1, tzinfo=UTC)


async def test_every_way_to_ask_for_the_time_gives_the_clocks(session: AsyncSession) -> None:
    asked = select(
        func.now(),
        func.clock_timestamp(),
        func.statement_timestamp(),
        func.current_timestamp(),
        text("transaction_timestamp()"),
    )
    with frozen_clock(NEW_YEAR) as clock:
        assert set((await session.execute(asked)).one()) == {NEW_YEAR}
        clock.tick(0.5)
        clock.tick(timedelta(hours=1))
        assert set((await session.execute(asked)).one()) == {clock.now} == {NEW_YEAR + timedelta(seconds=3600.5)}
        clock.move_to(NEW_YEAR)
        assert set((await session.execute(asked)).one()) == {NEW_YEAR}

    assert NEW_YEAR not in (await session.execute(asked)).one()


async def test_a_job_is_due_when_the_clock_says_so(session: AsyncSession) -> None:
    with frozen_clock(NEW_YEAR) as clock:
        await write.options(delay=60).enqueue(session, "delayed")
        await write.options(run_at=NEW_YEAR + timedelta(days=1)).enqueue(session, "tomorrow")
        (delayed,) = await assert_enqueued(session, write, word="delayed", delay=60)
        assert delayed.run_at == NEW_YEAR + timedelta(seconds=60)

        clock.tick(59)
        assert await drain(session) == []
        clock.tick(1)
        assert len(await drain(session)) == 1
        assert await drain(session) == []
        clock.move_to(NEW_YEAR + timedelta(days=1))
        assert len(await drain(session)) == 1


async def test_a_retry_waits_by_the_clock(session: AsyncSession) -> None:
    with frozen_clock() as clock:
        await fails_twice.enqueue(session)

        assert [ended.attempt for ended in await drain(session, raises=False)] == [1]
        assert await drain(session) == []
        clock.tick(timedelta(hours=1))
        assert [ended.attempt for ended in await drain(session, raises=False)] == [2]


async def test_what_is_committed_waits_by_the_clock_too(exarq_client: Client) -> None:
    with frozen_clock() as clock:
        async with exarq_client.sessions.begin() as session:
            await write.options(delay=3600).enqueue(session, "a")

        assert await drain(exarq_client) == []
        clock.tick(3600)
        assert len(await drain(exarq_client)) == 1


async def test_a_clock_within_a_clock_starts_at_its_time_and_gives_it_back(session: AsyncSession) -> None:
    now = select(func.now())
    with frozen_clock(NEW_YEAR):
        with frozen_clock() as inner:
            inner.tick(5)
            assert await session.scalar(now) == NEW_YEAR + timedelta(seconds=5)
        assert await session.scalar(now) == NEW_YEAR


async def test_a_clock_needs_a_time_zone_and_ticks_forward() -> None:
    with frozen_clock() as clock:
        with pytest.raises(ValueError, match="needs a time zone"):
            clock.move_to(datetime(2031, 1, 1))
        with pytest.raises(ValueError, match="must be between 0 seconds"):
            clock.tick(-1)
    with pytest.raises(ValueError, match="needs a time zone"), frozen_clock(datetime(2031, 1, 1)):
        pass
