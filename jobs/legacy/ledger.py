"""A double-entry ledger as it grew: payments from a file are booked, and a month is closed.

Sync SQLAlchemy, with lazy loads and a commit wherever a step is done; the caller brings the session. As a script:

    python jobs/legacy/ledger.py sqlite:///books.db 2026-10 < payments.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from datetime import UTC, date, datetime
from uuid import UUID

from sqlalchemy import BigInteger, DateTime, ForeignKey, Integer, String, create_engine, func
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship


class Base(DeclarativeBase):
    """The base of the ledger's tables."""


class Account(Base):
    """An account; its balance is the sum of its postings."""

    __tablename__ = "account"

    name: Mapped[str] = mapped_column(primary_key=True)

    postings: Mapped[list[Posting]] = relationship(back_populates="of_account", order_by="Posting.id")


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

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    order_id: Mapped[UUID] = mapped_column(index=True)
    account: Mapped[str] = mapped_column(ForeignKey(Account.name))
    amount: Mapped[int] = mapped_column(BigInteger)
    booked_on: Mapped[date] = mapped_column(server_default=func.current_date())

    of_account: Mapped[Account] = relationship(back_populates="postings")


class Month(Base):
    """A month of the books: open, or closed for good."""

    __tablename__ = "ledger_month"

    name: Mapped[str] = mapped_column(String(7), primary_key=True)
    closed: Mapped[bool] = mapped_column(default=False)

    balances: Mapped[list[Balance]] = relationship(back_populates="of_month", order_by="Balance.account")


class Balance(Base):
    """What moved on an account in a month."""

    __tablename__ = "ledger_balance"

    month: Mapped[str] = mapped_column(ForeignKey(Month.name), primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey(Account.name), primary_key=True)
    amount: Mapped[int] = mapped_column(BigInteger)

    of_month: Mapped[Month] = relationship(back_populates="balances")


class BooksClosed(Exception):
    """Raised for a payment of a month that is closed."""


class BooksUnbalanced(Exception):
    """Raised when the balances of a month do not add up to nothing."""


def post(session: Session, order_id: UUID) -> PaymentOrder:
    """Write both sides of an order."""
    order = session.get_one(PaymentOrder, order_id)
    day = order.placed_at.date()
    session.add_all(
        [
            Posting(order_id=order.id, account=order.debit, amount=-order.amount, booked_on=day),
            Posting(order_id=order.id, account=order.credit, amount=order.amount, booked_on=day),
        ]
    )
    return order


def book(session: Session, payments: Iterable[str]) -> int:
    """Book payments, each a line `id,day,debit,credit,cents`, and return how many were new; commits each."""
    booked = 0
    for id_, day, debit, credit, cents in csv.reader(payments):
        month = session.get(Month, day[:7])
        if month is not None and month.closed:
            raise BooksClosed(f"{day[:7]} is closed; book payment {id_} in a later month")
        for name in (debit, credit):
            _add_account(session, name)
        placed_at = datetime.combine(date.fromisoformat(day), datetime.min.time(), UTC)
        order = PaymentOrder(id=UUID(id_), debit=debit, credit=credit, amount=int(cents), placed_at=placed_at)
        session.add(order)
        try:
            post(session, order.id)
            session.commit()
        except IntegrityError:  # the bank sends some payments twice
            session.rollback()
            continue
        booked += 1
    return booked


def _add_account(session: Session, name: str) -> None:
    session.add(Account(name=name))
    try:
        session.commit()
    except IntegrityError:  # it is there
        session.rollback()


def close_month(session: Session, name: str) -> dict[str, int]:
    """Strike the balance of each account for a month, `2026-10`, and close it; one that was interrupted goes on."""
    month = session.get(Month, name)
    if month is None:
        month = Month(name=name)
        session.add(month)
        session.commit()
    for account in session.query(Account).order_by(Account.name).all():
        moved = [posting.amount for posting in account.postings if f"{posting.booked_on:%Y-%m}" == name]
        session.add(Balance(month=name, account=account.name, amount=sum(moved)))
        try:
            session.commit()
        except IntegrityError:  # struck before an interruption
            session.rollback()
    if sum(balance.amount for balance in month.balances):
        raise BooksUnbalanced(f"the balances of {name} do not add up to nothing")
    month.closed = True
    session.commit()
    return {balance.account: balance.amount for balance in month.balances}


def main(url: str, month: str) -> None:
    """Book the payments on standard input and close a month, in the database at `url`."""
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        booked = book(session, sys.stdin)
        balances = close_month(session, month)
    engine.dispose()
    sys.stdout.write(f"{booked} booked\n" + "".join(f"{name} {amount}\n" for name, amount in balances.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
