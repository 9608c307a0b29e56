"""A connection that is kept: one and the same while it works, a new one before it is found out the hard way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import ARRAY, Integer, Uuid, bindparam, func, literal, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.support import until
from worker.db.kept import Kept, fetch

NAMES = ["exarq one"]


@pytest.fixture
async def kept(engine: AsyncEngine) -> AsyncIterator[Kept]:
    kept = Kept(engine, lambda: NAMES[-1])
    yield kept
    await kept.close()


async def backend(connection: AsyncConnection) -> int:
    return int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())


async def backend_of(kept: Kept) -> int:
    async with kept.connect() as connection:
        return await backend(connection)


async def test_it_is_the_same_each_time_and_begins_no_transaction(kept: Kept, engine: AsyncEngine) -> None:
    first = await backend_of(kept)

    assert await backend_of(kept) == first
    async with engine.connect() as other:
        query = text("SELECT state FROM pg_stat_activity WHERE pid = :pid")
        assert (await other.execute(query, {"pid": first})).scalar_one() == "idle"


async def test_one_that_the_server_has_ended_is_replaced_before_it_is_used(kept: Kept, engine: AsyncEngine) -> None:
    async with kept.connect() as connection:
        first = await backend(connection)
        driver: Any = (await connection.get_raw_connection()).driver_connection
    async with engine.connect() as other:
        await other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": first})

    async def ended() -> bool:
        return bool(driver.is_closed())

    await until(ended, "its end was seen")
    assert await backend_of(kept) != first


async def test_one_with_a_former_name_is_given_back(
    kept: Kept, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kept.connect() as first:
        pass
    monkeypatch.setitem(globals(), "NAMES", ["exarq two"])

    async with kept.connect() as second:
        assert first.closed
        assert not second.closed


async def test_one_that_an_error_was_seen_on_is_given_back(kept: Kept) -> None:
    with pytest.raises(ZeroDivisionError):
        async with kept.connect() as connection:
            raise ZeroDivisionError

    assert connection.closed


async def test_the_driver_is_given_what_sqlalchemy_would_give_it(kept: Kept) -> None:
    ids = [uuid4(), uuid4()]
    statement = select(
        func.unnest(bindparam("ids", type_=ARRAY(Uuid))), literal(7, Integer), bindparam("me", type_=Uuid)
    ).where(bindparam("one", type_=Integer) == 1)
    given: dict[str, Any] = {"ids": ids, "me": ids[0], "one": 1}

    async with kept.connect() as connection:
        rows = await fetch(connection, statement, given)
        same = (await connection.execute(statement, given)).all()

    assert [tuple(row) for row in rows] == [(id_, 7, ids[0]) for id_ in ids] == [tuple(row) for row in same]
    assert all(isinstance(row[0], UUID) for row in rows)
