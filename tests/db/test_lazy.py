"""Lazy loads: refused with advice in async code, counted per attribute in sync code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import ForeignKey, event, select, text
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncEngine, AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    defaultload,
    mapped_column,
    object_session,
    relationship,
    selectinload,
    undefer,
    validates,
)

from tests.db.attempts import an_attempt
from tests.db.conftest import statements_of
from worker.core.errors import LazyLoadRefused
from worker.db.session import AttemptSession
from worker.db.transaction import ATTEMPT
from worker.flow.work import Work


class Base(DeclarativeBase):
    pass


class Order(AsyncAttrs, Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(server_default="")
    note: Mapped[str] = mapped_column(server_default="", deferred=True)
    lines: Mapped[list[Line]] = relationship(back_populates="order", order_by="Line.id")


class Line(Base):  # without AsyncAttrs
    __tablename__ = "line"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))
    order: Mapped[Order] = relationship(back_populates="lines")


class Parcel(Base):
    __tablename__ = "parcel"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(default="")
    order_id: Mapped[int | None] = mapped_column(ForeignKey(Order.id))
    order: Mapped[Order | None] = relationship()

    @validates("label", "order")
    def _asks(self, key: str, value: object) -> object:
        session = object_session(self)
        assert session is not None
        for line in session.scalars(select(Line)):
            assert key == "label" or line.order is not None
        return value


@pytest.fixture(autouse=True)
async def orders(engine: AsyncEngine) -> None:
    """Three orders of two lines each."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("INSERT INTO orders (id) SELECT generate_series(1, 3)"))
        await connection.execute(text("INSERT INTO line SELECT n, 1 + n % 3 FROM generate_series(1, 6) n"))


# ── in async code ───────────────────────────────────────────────────────────────────────────────────────────────────


async def a_relationship(session: AsyncSession) -> object:
    order = await session.get_one(Order, 1)
    return order.lines


async def the_other_side(session: AsyncSession) -> object:
    line = await session.get_one(Line, 1)
    return line.order


async def a_deferred_column(session: AsyncSession) -> object:
    order = await session.get_one(Order, 1)
    return order.note


async def an_expired_column(session: AsyncSession) -> object:
    order = await session.get_one(Order, 1)
    session.expire(order)
    return order.name


async def with_something_to_flush(session: AsyncSession) -> object:
    order = await session.get_one(Order, 1)
    session.add(Order(id=7))
    return order.lines


REFUSED = [
    (a_relationship, "Order.lines", "`return order.lines`", "write `await obj.awaitable_attrs.lines`"),
    (a_relationship, "Order.lines", f"({__name__}, line ", ".options(selectinload(Order.lines))"),
    (the_other_side, "Line.order", "`return line.order`", "give the base of Line sqlalchemy.ext.asyncio.AsyncAttrs"),
    (a_deferred_column, "Order.note", "`return order.note`", ".options(undefer(Order.note))"),
    (an_expired_column, "Order.name", "`return order.name`", "session.refresh(obj)"),
    (with_something_to_flush, "Order.lines", "`return order.lines`", "selectinload"),
]


@pytest.mark.parametrize(("body", "attribute", "line", "advice"), REFUSED)
async def test_a_lazy_load_in_async_code_is_refused_and_the_session_goes_on(
    work: Work, body: Callable[[AsyncSession], Awaitable[object]], attribute: str, line: str, advice: str
) -> None:
    for beside in (False, True):  # an attempt's session, and one that a job opens beside it
        async with an_attempt(work) as attempt, work.sessions() as own:
            session = own if beside else attempt.session()

            with statements_of(work.jobs_engine) as sent, pytest.raises(LazyLoadRefused) as refused:
                await body(session)

            said = str(refused.value)
            assert said.startswith(f"{attribute} is not loaded")
            assert line in said
            assert advice in said
            assert all(statement.startswith("SELECT") for statement in sent)
            await session.flush()
            assert (await session.execute(text("SELECT 1"))).scalar() == 1


async def reads_by_awaitable_attrs(session: AsyncSession) -> int:
    order = await session.get_one(Order, 1)
    return len(await order.awaitable_attrs.lines)


async def loads_eagerly(session: AsyncSession) -> int:
    order = await session.get_one(Order, 1, options=[selectinload(Order.lines).selectinload(Line.order)])
    return len([line.order for line in order.lines])


async def refreshes(session: AsyncSession) -> int:
    order = await session.get_one(Order, 1)
    await session.refresh(order, ["lines", "note"])
    return len(order.lines)


@pytest.mark.parametrize("body", [reads_by_awaitable_attrs, loads_eagerly, refreshes], ids=lambda body: body.__name__)
async def test_what_the_advice_says_works(work: Work, body: Callable[[AsyncSession], Awaitable[object]]) -> None:
    async with an_attempt(work) as attempt:
        assert await body(attempt.session()) == 2
        assert not attempt.transaction.lazy_loads


@pytest.mark.parametrize("key", ["label", "order"])
async def test_a_validators_query_is_not_taken_for_a_lazy_load_of_what_is_set(work: Work, key: str) -> None:
    async with an_attempt(work) as attempt:
        order = await attempt.session().get_one(Order, 1)
        parcel = Parcel(id=1)
        attempt.session().add(parcel)
        await attempt.session().flush()

        with pytest.raises(MissingGreenlet):
            setattr(parcel, key, "a" if key == "label" else order)


async def test_a_sync_call_that_is_no_lazy_load_fails_as_it_always_did(work: Work) -> None:
    async with an_attempt(work) as attempt:
        await attempt.session().execute(text("SELECT 1"))
        with pytest.raises(MissingGreenlet):
            attempt.session().sync_session.execute(text("SELECT 1"))


# ── in sync code ────────────────────────────────────────────────────────────────────────────────────────────────────


def reads_each_orders_lines(session: Session) -> None:
    for order in session.scalars(select(Order)):
        assert len(order.lines) == 2
        assert order.lines[0].order is order  # from the identity map


def reads_deferred_columns(session: Session) -> None:
    for order in session.scalars(select(Order)):
        assert order.note == ""


def reads_what_expired(session: Session) -> None:
    order = session.get_one(Order, 1)
    session.expire(order)
    assert (order.name, order.id) == ("", 1)  # one statement for all of its columns


def sets_what_is_not_loaded(session: Session) -> None:
    line = session.get_one(Line, 1)
    line.order = session.get_one(Order, 1)


def loads_what_it_needs(session: Session) -> None:
    options = selectinload(Order.lines).selectinload(Line.order), undefer(Order.note)
    for order in session.scalars(select(Order).options(*options)):
        assert [(line.order.note) for line in order.lines] == ["", ""]
    session.refresh(order)


def reads_lines_with_an_eager_load_behind(session: Session) -> None:
    order = session.scalars(select(Order).options(defaultload(Order.lines).selectinload(Line.order)).limit(1)).one()
    assert order.lines[0].order is order


def reads_lines_with_something_to_flush(session: Session) -> None:
    order = session.get_one(Order, 1)
    event.listen(session, "before_flush", lambda session, *_: session.scalars(select(Line)).all())
    session.add(Order(id=7))
    assert len(order.lines) == 2


def sets_what_a_validator_asks_for(session: Session) -> None:
    parcel = Parcel(id=1)
    session.add(parcel)
    parcel.label = "a"


def sets_what_a_validator_loads_something_for(session: Session) -> None:
    parcel = Parcel(id=1)
    session.add(parcel)
    parcel.order = session.get_one(Order, 1)


COUNTED = [
    (sets_what_a_validator_asks_for, {}),
    (sets_what_a_validator_loads_something_for, {"Line.order": 2}),
    (reads_lines_with_an_eager_load_behind, {"Order.lines": 1}),
    (reads_lines_with_something_to_flush, {"Order.lines": 1}),
    (reads_each_orders_lines, {"Order.lines": 3}),
    (reads_deferred_columns, {"Order.note": 3}),
    (reads_what_expired, {"Order.name": 1}),
    (sets_what_is_not_loaded, {}),
    (loads_what_it_needs, {}),
]


@pytest.mark.parametrize(("body", "counts"), COUNTED)
async def test_lazy_loads_of_sync_code_are_counted_per_attribute(
    work: Work, body: Callable[[Session], None], counts: dict[str, int]
) -> None:
    async with an_attempt(work) as attempt:
        await attempt.session().run_sync(body)
        await attempt.session().run_sync(lambda session: session.expire_all())
        await reads_by_awaitable_attrs(attempt.session())  # asked for, and so not counted

        assert attempt.transaction.lazy_loads.by_attribute == counts


async def test_a_hook_that_executes_the_statement_itself_hides_no_lazy_load(work: Work) -> None:
    def invokes(state: ORMExecuteState) -> Any:
        return state.invoke_statement()

    async with an_attempt(work) as attempt:
        event.listen(attempt.session().sync_session, "do_orm_execute", invokes)
        order = await attempt.session().get_one(Order, 1)

        with pytest.raises(LazyLoadRefused):
            _ = order.lines


class Routed(AttemptSession):
    """A session as a user may have written it."""

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        return super().execute(*args, **kwargs)


async def test_a_users_session_that_executes_in_its_own_way_does_not_hide_lazy_loads(work: Work) -> None:
    async with an_attempt(work) as attempt:

        def reads(_: Session) -> None:
            with Routed(bind=attempt.transaction.engine, info={ATTEMPT: attempt.transaction}) as session:
                reads_each_orders_lines(session)

        await attempt.session().run_sync(reads)

        assert attempt.transaction.lazy_loads.by_attribute == {"Order.lines": 3}
