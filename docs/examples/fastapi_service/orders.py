"""What the service and the worker share: a table, and a job."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from worker import job


class Base(DeclarativeBase):
    """The base of the tables."""


class Order(Base):
    """What somebody wants."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    quantity: Mapped[int]
    confirmed: Mapped[bool] = mapped_column(default=False)


@job
async def confirm(session: AsyncSession, order_id: int) -> str:
    """Confirm an order; that it is confirmed and that this job has succeeded commit together."""
    order = await session.get_one(Order, order_id)
    order.confirmed = True
    return f"{order.quantity} x {order.item}"
