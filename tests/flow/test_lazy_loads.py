"""Lazy loads of an attempt's sync code: kept with it, and told when they are over the definition's budget."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import ForeignKey, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from tests.flow.helpers import NAME, a_work_with, run_new
from tests.support import attempts, heard, row, state
from worker.observe.events import AttemptEnded, LazyLoadsOverBudget
from worker.settings import Settings


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    lines: Mapped[list[Line]] = relationship()


class Line(Base):
    __tablename__ = "line"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))


@pytest.fixture(autouse=True)
async def five_orders(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("INSERT INTO orders (id) SELECT generate_series(1, 5)"))


def legacy(session: Session) -> int:
    return sum(len(order.lines) for order in session.scalars(select(Order)))


def writes(session: Session) -> int:
    session.add(Order(id=6))
    return legacy(session)


async def calls_sync_code(session: AsyncSession) -> int:
    return await session.run_sync(legacy)


@pytest.mark.parametrize("job", [legacy, writes, calls_sync_code], ids=lambda job: job.__name__)
async def test_a_success_over_its_budget_is_told_once_and_leaves_an_attempt(
    engine: AsyncEngine, settings: Settings, job: Any
) -> None:
    loads = 6 if job is writes else 5
    async with a_work_with(settings, job, lazy_loads=loads - 1) as work, heard() as told:
        job_id, _ = await run_new(work, engine)

    assert told[:1] == [
        LazyLoadsOverBudget(
            job=job_id,
            name=NAME,
            allowed=loads - 1,
            lazy_loads=loads,
            most=f"Order.lines: {loads}",
            instead="load it with the objects: .options(selectinload(Order.lines))",
        )
    ]
    assert [type(event) for event in told[1:]] == [AttemptEnded]
    (attempt,) = await attempts(engine, job_id)
    assert (attempt.ending, attempt.lazy_loads) == ("succeeded", {"Order.lines": loads})
    assert (await row(engine, job_id)).state == "succeeded"


@pytest.mark.parametrize("options", [{"lazy_loads": 5}, {"lazy_loads": None}, {}], ids=str)
async def test_a_success_within_its_budget_or_without_one_says_nothing(
    engine: AsyncEngine, settings: Settings, options: Any
) -> None:
    async with a_work_with(settings, legacy, **options) as work, heard() as told:
        job_id, _ = await run_new(work, engine)

    assert [type(event) for event in told] == [AttemptEnded]
    assert (await state(engine, job_id), await attempts(engine, job_id)) == ("succeeded", [])


async def test_a_budget_of_none_at_all_tells_of_the_first(engine: AsyncEngine, settings: Settings) -> None:
    def job(session: Session) -> None:
        _ = session.get_one(Order, 1).lines

    async with a_work_with(settings, job, lazy_loads=0) as work:
        job_id, _ = await run_new(work, engine)

    (attempt,) = await attempts(engine, job_id)
    assert attempt.lazy_loads == {"Order.lines": 1}


async def test_a_failure_keeps_its_lazy_loads_whatever_the_budget(engine: AsyncEngine, settings: Settings) -> None:
    def job(session: Session) -> None:
        legacy(session)
        raise ValueError

    async with a_work_with(settings, job, lazy_loads=None, max_attempts=1) as work:
        job_id, _ = await run_new(work, engine)

    (attempt,) = await attempts(engine, job_id)
    assert (attempt.ending, attempt.lazy_loads) == ("failed", {"Order.lines": 5})


async def test_a_lazy_load_in_async_code_fails_the_attempt_with_the_line_and_the_way(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> None:
        order = await session.get_one(Order, 1)
        assert order.lines == []

    async with a_work_with(settings, job, max_attempts=1) as work:
        job_id, _ = await run_new(work, engine)

    error = (await row(engine, job_id)).error
    assert error.startswith("worker.core.errors.LazyLoadRefused: Order.lines is not loaded")
    assert f"({__name__}, line {job.__code__.co_firstlineno + 2}: `assert order.lines == []`)" in error
    assert ".options(selectinload(Order.lines))" in error
