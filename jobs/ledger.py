"""The ledger's jobs: its code is older than they are, and runs in them unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID, uuid4

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from jobs.legacy import ledger
from jobs.legacy.ledger import Account, Base, PaymentOrder, Posting
from worker import Handle, job

__all__ = [
    "Account",
    "Base",
    "PaymentOrder",
    "Posted",
    "Posting",
    "book",
    "close_month",
    "create_tables",
    "place",
    "post",
]


@dataclass(frozen=True, slots=True)
class Posted:
    """What was moved."""

    debit: str
    credit: str
    amount: int


@job
def post(session: Session, order_id: UUID) -> Posted:
    """Write both sides of an order."""
    order = ledger.post(session, order_id)
    return Posted(order.debit, order.credit, order.amount)


@job
def book(session: Session, payments: list[str]) -> int:
    """Book payments, each a line `id,day,debit,credit,cents`; returns how many were new."""
    return ledger.book(session, payments)


@job
def close_month(session: Session, month: str) -> dict[str, int]:
    """Strike the balance of each account for a month, `2026-10`, and close it."""
    return ledger.close_month(session, month)


async def create_tables(connection: AsyncConnection) -> None:
    """Create the tables that are not there yet; a real project has migrations for this."""
    await connection.run_sync(ledger.Base.metadata.create_all)


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
