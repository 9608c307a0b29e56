"""Steps of upkeep: whoever comes first takes the turn, and the next goes on where it ended."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from worker.db import turns
from worker.db.ids import uuid7
from worker.db.turns import Position, Turn

NO_REST = timedelta(0)


async def test_a_new_step_is_due_and_starts_at_the_beginning(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        assert await turns.take(connection, "reconcile") == Turn("reconcile", None)


async def test_a_step_that_nobody_knows_is_never_due(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        assert await turns.take(connection, "dance") is None


async def test_a_turn_that_somebody_has_is_not_waited_for(engine: AsyncEngine) -> None:
    async with engine.begin() as first, engine.begin() as second:
        await turns.take(first, "reconcile")

        assert await turns.take(second, "reconcile") is None
        assert await turns.take(second, "prune") is not None


async def test_a_step_rests_after_its_turn(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        turn = await turns.take(connection, "prune")
        assert turn is not None
        await turns.end(connection, turn, rest=timedelta(minutes=1))

    async with engine.begin() as connection:
        assert await turns.take(connection, "prune") is None
        assert await turns.take(connection, "reconcile") is not None


async def test_the_next_turn_goes_on_behind_the_position_of_the_last(engine: AsyncEngine) -> None:
    position = Position(datetime.now(UTC), uuid7())
    async with engine.begin() as connection:
        await turns.end(connection, Turn("reconcile", None), rest=NO_REST, after=position)
    async with engine.begin() as connection:
        second = await turns.take(connection, "reconcile")
        await turns.end(connection, Turn("reconcile", position), rest=NO_REST)

    async with engine.begin() as connection:
        third = await turns.take(connection, "reconcile")

    assert second == Turn("reconcile", position)
    assert third == Turn("reconcile", None)


async def test_a_turn_that_failed_is_due_again_at_once(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        turn = await turns.take(connection, "prune")
        assert turn is not None
        await turns.end(connection, turn, rest=timedelta(minutes=1))
        await connection.rollback()

    async with engine.begin() as connection:
        assert await turns.take(connection, "prune") is not None
