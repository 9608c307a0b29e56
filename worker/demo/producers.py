"""The producers: ordinary services with sessions of their own, whose every tenth transaction rolls back."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import random
from collections.abc import Iterator
from typing import Any, Final
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker

from worker.core.errors import ModuleNotLoaded
from worker.core.registry import load_modules
from worker.demo.notebook import CATALOGUE, POSTING, Notebook
from worker.flow.enqueue import enqueue_many

MODULES: Final = ("jobs.inventory", "jobs.ledger")
PRODUCERS: Final = 8
_EVERY_TENTH: Final = 10
_ACCOUNTS: Final = [f"account {number:02}" for number in range(20)]


class Declined(Exception):
    """Raised inside a business transaction, so that it rolls back: the payment was not allowed after all."""


class Business:
    """The repository's own jobs, found by name as a worker finds them.

    Raises: `ModuleNotLoaded` outside of the checkout.
    """

    def __init__(self) -> None:
        try:
            load_modules(MODULES)
        except ModuleNotLoaded as error:
            raise ModuleNotLoaded(
                f"{error}; the demo runs the jobs of Exarq's repository: start it in a checkout"
            ) from None
        self._inventory, self._ledger = (importlib.import_module(name) for name in MODULES)

    async def create_tables(self, connection: AsyncConnection) -> None:
        """Create the business tables, and accounts to pay from."""
        await self._inventory.create_tables(connection)
        await self._ledger.create_tables(connection)
        accounts: Any = self._ledger.Account.__table__
        await connection.execute(accounts.insert(), [{"name": name} for name in _ACCOUNTS])

    async def place_orders(self, count: int, sessions: async_sessionmaker[AsyncSession], notebook: Notebook) -> None:
        """Place so many orders, several producers at once, each order in a transaction of its own."""
        numbers = iter(range(1, count + 1))  # shared: each producer takes the next
        async with asyncio.TaskGroup() as producers:
            for _ in range(PRODUCERS):
                producers.create_task(self._place_some(sessions, notebook, numbers))

    async def take_inventory(self, sessions: async_sessionmaker[AsyncSession], notebook: Notebook) -> int:
        """Enqueue one job for each distribution of this environment, all in one transaction; returns how many."""
        calls = [self._inventory.catalogue.call(name) for name in self._inventory.plan()]
        async with sessions.begin() as session:
            handles = await enqueue_many(session, calls)
            for handle in handles:
                notebook.intend(CATALOGUE, handle.id)
        for handle in handles:
            notebook.ended_with(handle.id, committed=True)
        return len(handles)

    async def _place_some(
        self, sessions: async_sessionmaker[AsyncSession], notebook: Notebook, numbers: Iterator[int]
    ) -> None:
        for number in numbers:
            debit, credit = random.sample(_ACCOUNTS, 2)
            order_id = uuid4()
            declined = number % _EVERY_TENTH == 0
            with contextlib.suppress(Declined):
                async with sessions.begin() as session:
                    handle = await self._ledger.place(session, debit, credit, number, order_id=order_id)
                    await session.flush()  # also what will be rolled back has reached the database
                    notebook.intend(POSTING, handle.id, order_id)
                    if declined:
                        raise Declined
            notebook.ended_with(handle.id, committed=not declined)
