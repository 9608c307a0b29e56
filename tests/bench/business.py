"""What the jobs do, the same for every system: one insert, or a small piece of legacy bookkeeping.

Needs SQLAlchemy and asyncpg only, for it runs in each system's own environment.
"""

from __future__ import annotations

import os
from typing import Final

from sqlalchemy import ForeignKey, insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from tests.bench.peer import DATABASE_URL

_ACCOUNTS: Final = 1_000  # so many that no two jobs that run at once wait for one row


class Base(DeclarativeBase):
    """The tables of the business."""


class Owner(Base):
    """Who has an account."""

    __tablename__ = "bench_owner"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Account(Base):
    """What somebody has."""

    __tablename__ = "bench_account"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey(Owner.id))
    balance: Mapped[int] = mapped_column(default=0)
    owner: Mapped[Owner] = relationship()


class Entry(Base):
    """What happened."""

    __tablename__ = "bench_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    note: Mapped[str]


async def write(session: AsyncSession, number: int) -> int:
    """The job `orm`: one insert through the session; whose commit it is, the system says."""
    session.add(Entry(number=number, note="written by a job"))
    await session.flush()
    return number


def post(session: Session, number: int) -> int:
    """The job `legacy`: a SELECT, a lazy load, an UPDATE and an INSERT, as sync code that nobody has touched."""
    account = session.get_one(Account, number % _ACCOUNTS)
    note = f"for {account.owner.name}"
    account.balance += 1
    session.add(Entry(number=number, note=note))
    session.flush()
    return number


def engine(connections: int) -> AsyncEngine:
    """The engine as a good engineer makes it for a worker: a connection for each job that runs at once."""
    return create_async_engine(sqlalchemy_url(), pool_size=connections, max_overflow=0)


def sessions(connections: int) -> async_sessionmaker[AsyncSession]:
    """The session factory on such an engine."""
    return async_sessionmaker(engine(connections), expire_on_commit=False)


def sqlalchemy_url() -> str:
    """The address of the database for SQLAlchemy's asyncio engine."""
    return os.environ[DATABASE_URL].replace("postgresql://", "postgresql+asyncpg://", 1)


async def install(admin: AsyncEngine) -> None:
    """Make the tables, once."""
    async with admin.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Owner), [{"id": n, "name": f"owner {n}"} for n in range(_ACCOUNTS)])
        await connection.execute(insert(Account), [{"id": n, "owner_id": n} for n in range(_ACCOUNTS)])
