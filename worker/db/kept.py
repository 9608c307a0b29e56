"""A connection that is kept from one statement to the next, and what the driver executes on it by itself.

To fetch one from the pool and to go through SQLAlchemy costs more than a claim takes otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Executable
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


class Kept:
    """A connection of one user, in AUTOCOMMIT.

    Args:
        engine: where it comes from.
        application_name: what the engine's connections are called now.

    """

    def __init__(self, engine: AsyncEngine, application_name: Callable[[], str]) -> None:
        self._engine = engine
        self._application_name = application_name
        self._connection: AsyncConnection | None = None
        self._named = ""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """The connection, seen to be open and under its present name, else a new one; after an error it is not kept."""
        connection = self._connection
        if connection is None or self._named != self._application_name() or _has_ended(connection):
            connection = await self._anew()
        try:
            yield connection
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Give it back to the pool, which looks whether it can be used again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _anew(self) -> AsyncConnection:
        await self.close()
        self._named = self._application_name()
        connection = await self._engine.connect()
        self._connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        return self._connection


async def fetch(connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Any]:
    """The rows of a statement, from the driver itself: in AUTOCOMMIT only, for SQLAlchemy has begun no transaction."""
    sql, constants, names = _compiled(statement)
    values = {**constants, **parameters}
    rows: Sequence[Any] = await _driver(connection).fetch(sql, *(values[name] for name in names))
    return rows


@functools.cache
def _compiled(statement: Any) -> tuple[str, dict[str, Any], Sequence[str]]:
    compiled = statement.compile(dialect=dialect())  # type: ignore[no-untyped-call]
    return str(compiled), compiled.params, compiled.positiontup


def _has_ended(connection: AsyncConnection) -> bool:
    return connection.closed or connection.invalidated or _driver(connection).is_closed()


def _driver(connection: AsyncConnection) -> Any:
    return connection.sync_connection.connection.driver_connection  # type: ignore[union-attr]  # it is open
