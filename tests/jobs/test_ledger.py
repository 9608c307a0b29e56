"""The ledger: an order is posted once if, and only if, its transaction committed."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from jobs.ledger import Account, PaymentOrder, Posted, Posting, place, post
from worker import Client
from worker.testing import assert_enqueued, assert_not_enqueued, drain, run_inline

POSTINGS = select(Posting.order_id, Posting.account, Posting.amount).order_by(Posting.account)


@pytest.fixture
async def session(exarq_session: AsyncSession) -> AsyncSession:
    await exarq_session.execute(insert(Account), [{"name": "anna"}, {"name": "bert"}])
    return exarq_session


async def rows(session: AsyncSession, query: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await session.execute(query)]


async def test_an_order_is_placed_together_with_its_job(session: AsyncSession) -> None:
    order_id = uuid4()

    handle = await place(session, "anna", "bert", 250, order_id=order_id)

    (enqueued,) = await assert_enqueued(session, post, order_id=order_id, count=1)
    assert enqueued.id == handle.id


async def test_an_order_is_posted_on_both_sides(session: AsyncSession) -> None:
    order_id = uuid4()
    await place(session, "anna", "bert", 250, order_id=order_id)

    assert await run_inline(post, session, order_id) == Posted("anna", "bert", 250)

    assert await rows(session, POSTINGS) == [(order_id, "anna", -250), (order_id, "bert", 250)]


async def test_an_order_is_posted_once_however_often_the_jobs_are_run(session: AsyncSession) -> None:
    await place(session, "anna", "bert", 250)

    assert [ended.outcome for ended in await drain(session)] == ["succeeded"]
    assert await drain(session) == []

    assert len(await rows(session, POSTINGS)) == 2


async def test_a_business_transaction_that_rolls_back_leaves_neither_order_nor_job(exarq_client: Client) -> None:
    async with exarq_client.sessions.begin() as session:
        await session.execute(insert(Account), [{"name": "anna"}, {"name": "bert"}])
    async with exarq_client.sessions() as session:
        await place(session, "anna", "bert", 250)
        await session.flush()
        await session.rollback()

    assert await drain(exarq_client) == []

    await assert_not_enqueued(exarq_client)
    async with exarq_client.sessions() as session:
        assert await rows(session, select(PaymentOrder.id)) == []
        assert await rows(session, POSTINGS) == []


async def test_an_attempt_that_fails_half_way_leaves_no_posting_and_the_next_leaves_both(session: AsyncSession) -> None:
    await session.execute(text("CREATE SEQUENCE written"))
    await session.execute(
        text("ALTER TABLE posting ADD CHECK (nextval('written') <> 2)")  # the second row that is ever written fails
    )
    await place(session, "anna", "bert", 250)

    (failed,) = await drain(session, raises=False)
    assert failed.outcome == "retried"
    assert await session.scalar(select(func.count()).select_from(Posting)) == 0

    (again,) = await drain(session, with_scheduled=True)
    assert again.attempt == 2
    assert [amount for _, _, amount in await rows(session, POSTINGS)] == [-250, 250]


@pytest.mark.parametrize(("credit", "amount"), [("bert", 0), ("bert", -1), ("anna", 5)])
async def test_an_order_that_moves_nothing_is_refused(session: AsyncSession, credit: str, amount: int) -> None:
    with pytest.raises(ValueError, match="an order moves"):
        await place(session, "anna", credit, amount)
    await assert_not_enqueued(session)
