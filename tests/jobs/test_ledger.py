"""The ledger: an order is posted once if, and only if, its transaction committed."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from jobs import ledger
from jobs.ledger import Account, PaymentOrder, Posting, place
from tests.support import row, run_all, state
from worker import Settings
from worker.core.registry import Registry

Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture
async def registry(engine: AsyncEngine) -> Registry:
    registry = Registry()
    registry.register(ledger.post)
    async with engine.begin() as connection:
        await ledger.create_tables(connection)
        await connection.execute(insert(Account), [{"name": "anna"}, {"name": "bert"}])
    return registry


async def postings(engine: AsyncEngine) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        query = select(Posting.order_id, Posting.account, Posting.amount).order_by(Posting.account)
        return [tuple(found) for found in await connection.execute(query)]


async def test_an_order_is_posted_on_both_sides(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry
) -> None:
    order_id = uuid4()

    async with sessions.begin() as session:
        handle = await place(session, "anna", "bert", 250, order_id=order_id)
    await run_all(settings, registry)

    assert (await row(engine, handle.id)).result == {"debit": "anna", "credit": "bert", "amount": 250}
    assert await postings(engine) == [(order_id, "anna", -250), (order_id, "bert", 250)]


async def test_a_business_transaction_that_rolls_back_leaves_neither_order_nor_job(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry
) -> None:
    async with sessions() as session:
        handle = await place(session, "anna", "bert", 250)
        await session.flush()
        await session.rollback()

    await run_all(settings, registry)

    assert await state(engine, handle.id) is None
    assert await postings(engine) == []
    async with engine.connect() as connection:
        assert (await connection.execute(select(PaymentOrder.id))).all() == []


async def test_a_worker_that_runs_a_second_time_posts_nothing_twice(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry
) -> None:
    async with sessions.begin() as session:
        await place(session, "anna", "bert", 250)
    await run_all(settings, registry)

    await run_all(settings, registry)

    assert len(await postings(engine)) == 2


async def test_an_attempt_that_fails_half_way_leaves_no_posting_and_the_next_leaves_both(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE SEQUENCE written"))
        await connection.execute(
            text("ALTER TABLE posting ADD CHECK (nextval('written') <> 2)")  # the second row that is ever written fails
        )

    async with sessions.begin() as session:
        handle = await place(session, "anna", "bert", 250)
    await run_all(settings, registry)
    while await state(engine, handle.id) == "queued":  # its retry is due after some milliseconds
        await run_all(settings, registry)

    assert (await row(engine, handle.id)).failures == 1
    assert [amount for _, _, amount in await postings(engine)] == [-250, 250]


@pytest.mark.parametrize(("credit", "amount"), [("bert", 0), ("bert", -1), ("anna", 5)])
async def test_an_order_that_moves_nothing_is_refused(
    sessions: Sessions, registry: Registry, credit: str, amount: int
) -> None:
    async with sessions() as session:
        with pytest.raises(ValueError, match="an order moves"):
            await place(session, "anna", credit, amount)
