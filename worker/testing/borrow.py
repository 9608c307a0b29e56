"""An engine whose only connection is that of a test's session: what is committed on it is a savepoint of the test's."""

from __future__ import annotations

import itertools
from typing import Any

import asyncpg
from asyncpg.transaction import Transaction, TransactionState
from sqlalchemy import Engine, NullPool
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from worker.core.errors import AutocommitRefused, ExarqError
from worker.db.engine import RESET

_numbers = itertools.count(1)


class ConnectionLost(ExarqError):
    """Raised when the test's own connection was closed while jobs ran on it."""

    def __init__(self) -> None:
        super().__init__(
            "the connection of the test's session was closed, and its transaction with it; test what a job does to"
            " connections on a database of its own, with drain(client)"
        )


async def borrow(session: AsyncSession) -> AsyncEngine:
    """An engine on the session's connection; each of its checkouts is a savepoint in the session's transaction.

    Raises: `AutocommitRefused` where there is no transaction to be part of.
    """
    connection = await session.connection()
    fairy = await connection.get_raw_connection()
    if getattr(fairy.dbapi_connection, "autocommit", False):
        raise AutocommitRefused("this session's connection is in AUTOCOMMIT; give the test a session with transactions")
    raw = fairy.driver_connection
    if not isinstance(raw, asyncpg.Connection):
        raise TypeError(f"jobs run on asyncpg, not on {type(raw).__module__}; use postgresql+asyncpg://…")
    lender = _Lender(raw, await raw.fetchval("SELECT current_setting('idle_in_transaction_session_timeout')"))
    dialect = connection.dialect
    pool = NullPool(lambda: dialect.connect(async_creator_fn=lender.lend), dialect=dialect)
    return AsyncEngine(Engine(pool, dialect, connection.engine.url))


class _Lender:
    def __init__(self, raw: Any, idle_timeout: str) -> None:
        self._raw = raw
        self.restore_idle_timeout = f"SET LOCAL idle_in_transaction_session_timeout = '{idle_timeout}'"

    async def lend(self) -> _Borrowed:
        if self._raw.is_closed():
            raise ConnectionLost
        borrowed = _Borrowed(self._raw, self)
        await self._raw.execute(f"SAVEPOINT {borrowed.savepoint}")
        return borrowed


class _ReadOnlySavepoint(Transaction):
    """A savepoint in which PostgreSQL refuses each write; asyncpg leaves that to the outermost transaction."""

    def __init__(self, raw: Any) -> None:
        super().__init__(raw, None, readonly=False, deferrable=False)
        self._raw = raw

    async def start(self) -> None:
        await super().start()
        await self._raw.execute("SET TRANSACTION READ ONLY")


class _Borrowed:
    """A checkout: asyncpg's connection, whose closing ends no more than the checkout's savepoint.

    asyncpg makes of each `transaction()` within the test's a savepoint, so what SQLAlchemy commits here is one.
    """

    _top_xact = None  # the test's own transaction is none of this checkout's

    def __init__(self, raw: Any, lender: _Lender) -> None:
        self._raw = raw
        self._lender = lender
        self._last: Any = None  # the latest transaction on it
        self.savepoint = f"exarq_{next(_numbers)}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def transaction(self, *, readonly: bool = False, **_not_a_savepoints: object) -> Transaction:
        """A savepoint, read-only where that is asked for; its isolation is that of the test's transaction."""
        begun: Transaction = _ReadOnlySavepoint(self._raw) if readonly else self._raw.transaction()
        self._last = begun
        return begun

    def is_in_transaction(self) -> bool:
        """Whether it is in one of this checkout's, for the test's goes on around it."""
        started = self._last is not None and self._last._state is TransactionState.STARTED
        return started and bool(self._raw.is_in_transaction())

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        """Pass it on; what the test has set on its connection is not reset after each attempt."""
        return None if query == RESET else await self._raw.execute(query, *args, **options)

    async def close(self, *, timeout: float | None = None) -> None:
        """End the checkout: given back, its savepoint is kept; thrown away (with a time limit), it is rolled back."""
        if self._raw.is_closed():
            return
        undo = f"ROLLBACK TO SAVEPOINT {self.savepoint}; RELEASE SAVEPOINT {self.savepoint}"
        release = f"RELEASE SAVEPOINT {self.savepoint}; {self._lender.restore_idle_timeout}"
        if timeout is not None:
            await self._raw.execute(undo)
            return
        try:
            await self._raw.execute(release)
        except asyncpg.InFailedSQLTransactionError:  # a single statement without a transaction of its own has failed
            await self._raw.execute(undo)

    def terminate(self) -> None:
        """Nobody but the test ends its connection."""
