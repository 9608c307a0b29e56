"""Payments: an order is written together with the job that will post it, and posted exactly once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import BigInteger, DateTime, ForeignKey, func
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncConnection, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from worker import Handle, job


class Base(AsyncAttrs, DeclarativeBase):
    """The base of the ledger's tables."""


class Account(Base):
    """An account; its balance is the sum of its postings."""

    __tablename__ = "account"

    name: Mapped[str] = mapped_column(primary_key=True)


class PaymentOrder(Base):
    """The instruction to move an amount, in cents, from one account to another."""

    __tablename__ = "payment_order"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    debit: Mapped[str] = mapped_column(ForeignKey(Account.name))
    credit: Mapped[str] = mapped_column(ForeignKey(Account.name))
    amount: Mapped[int] = mapped_column(BigInteger)
    placed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class Posting(Base):
    """One side of an order; nothing here is unique to the order, so that an effect that came twice would show."""

    __tablename__ = "posting"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    order_id: Mapped[UUID] = mapped_column(index=True)
    account: Mapped[str] = mapped_column(ForeignKey(Account.name))
    amount: Mapped[int] = mapped_column(BigInteger)


async def create_tables(connection: AsyncConnection) -> None:
    """Create the tables that are not there yet; a real project has migrations for this."""
    await connection.run_sync(Base.metadata.create_all)


@dataclass(frozen=True, slots=True)
class Posted:
    """What was moved."""

    debit: str
    credit: str
    amount: int


async def place(session: AsyncSession, debit: str, credit: str, amount: int, *, order_id: UUID | None = None) -> Handle:
    """Place an order in the caller's transaction: it will be posted if, and only if, that commits.

    Args:
        session: the caller's session.
        debit: the account the amount leaves.
        credit: the account it goes to.
        amount: cents, more than zero.
        order_id: the caller's own id for the order; without one, a new one.

    Raises: `ValueError` for an order that would move nothing.

    """
    if amount <= 0 or debit == credit:
        raise ValueError("an order moves an amount of more than zero between two different accounts")
    order = PaymentOrder(id=order_id or uuid4(), debit=debit, credit=credit, amount=amount)
    session.add(order)
    return await post.enqueue(session, order.id)


@job
async def post(session: AsyncSession, order_id: UUID) -> Posted:
    """Write both sides of an order."""
    order = await session.get_one(PaymentOrder, order_id)
    session.add_all(
        [
            Posting(order_id=order.id, account=order.debit, amount=-order.amount),
            Posting(order_id=order.id, account=order.credit, amount=order.amount),
        ]
    )
    return Posted(order.debit, order.credit, order.amount)
