"""The tests' databases, each lent to one test at a time: what a test leaves as migrated is emptied and lent again.

To make a database and to drop it costs a server more than most tests do, and a server with fsync most of all.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString

import psycopg
from psycopg.errors import OperationalError, UndefinedTable
from psycopg.sql import SQL, Identifier
from psycopg.types.json import Jsonb
from sqlalchemy.engine import URL

KEPT: Final = "exarq tests"
"""What the connection calls itself that stays while a database is lent."""

_FIRST_OID: Final = 16_384  # what is below is PostgreSQL's own
_CATALOGS: Final[tuple[LiteralString, ...]] = (
    *("pg_attrdef", "pg_class", "pg_constraint", "pg_default_acl", "pg_event_trigger", "pg_operator"),
    *("pg_policy", "pg_proc", "pg_rewrite", "pg_statistic_ext", "pg_trigger", "pg_type"),
)
_NEWEST: Final = " UNION ALL ".join(
    f"SELECT '{catalog}', count(*), max(xmin::text::bigint) FROM {catalog} WHERE {column} >= {_FIRST_OID}"
    for catalog, column in (
        *((one, "oid") for one in _CATALOGS),
        ("pg_attribute", "attrelid"),
        ("pg_statistic", "starelid"),
    )
)
_REST: Final = """
    SELECT 'pg_namespace', count(*), max(xmin::text::bigint) FROM pg_namespace
    UNION ALL SELECT 'pg_db_role_setting', count(*), max(s.xmin::text::bigint)
    FROM pg_db_role_setting AS s JOIN pg_database AS d ON d.oid = s.setdatabase WHERE datname = current_database()
"""
_OURS: Final = "FROM pg_class WHERE relnamespace = 'exarq'::regnamespace AND relkind = 'r'"
_MOST_GROWN: Final = 2_000_000  # bytes
_LOOKS: Final = 3_000
_BETWEEN_LOOKS: Final = 0.02  # seconds


@dataclass(frozen=True)
class Made:
    """How a database was when it was made."""

    catalogs: frozenset[tuple[Any, ...]]
    size: int
    rows: dict[str, list[Any]]

    @classmethod
    def of(cls, connection: psycopg.Connection[Any]) -> Made:
        rows = {}
        for (table,) in connection.execute(f"SELECT relname {_OURS}").fetchall():
            query = SQL("SELECT to_jsonb(one) FROM exarq.{} AS one").format(Identifier(table))
            rows[table] = [row for (row,) in connection.execute(query)]
        return cls(_catalogs(connection), _size(connection), rows)

    def is_still(self, connection: psycopg.Connection[Any]) -> bool:
        """Whether nothing but rows has changed, and those have left it small."""
        return _catalogs(connection) == self.catalogs and _size(connection) <= self.size + _MOST_GROWN

    def restore(self, connection: psycopg.Connection[Any]) -> None:
        """Leave the rows of the migrations alone."""
        with connection.transaction():
            for name, rows in self.rows.items():
                table = SQL("exarq.{}").format(Identifier(name))
                connection.execute(SQL("DELETE FROM {}").format(table))
                again = SQL("INSERT INTO {0} SELECT * FROM jsonb_populate_recordset(NULL::{0}, %s)").format(table)
                if rows:
                    connection.execute(again, [Jsonb(rows)])


@dataclass
class TestDatabases:
    """Copies of a migrated template, made when there is none to lend.

    Args:
        server: an address of the server, as somebody who may make databases.
        admin: a connection to it, and on no loop.
        template: what is copied.
        copying: how, as CREATE DATABASE is told it.

    """

    __test__ = False

    server: URL
    admin: psycopg.Connection[Any]
    template: str
    copying: str
    _made: dict[str, Made] = field(default_factory=dict)
    _at_hand: list[str] = field(default_factory=list)
    _connections: dict[str, psycopg.Connection[Any]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def lend(self) -> str:
        """The name of a migrated database that nobody uses."""
        if self._at_hand:
            return self._at_hand.pop()
        name = f"exarq_test_{os.getpid()}_{next(self._numbers)}"
        self.admin.execute(f"CREATE DATABASE {name} TEMPLATE {self.template} {self.copying}")
        self._made[name] = Made.of(self._connected(name))
        return name

    async def take_back(self, name: str, *, may_run: bool) -> None:
        """Have it for the next test; fails if a connection is open, or a job runs without `may_run`."""
        connection = self._connected(name)
        await self._nobody_is_connected(name, connection.info.backend_pid)
        if not may_run:
            _nothing_runs(connection)
        if self._made[name].is_still(connection):
            self._made[name].restore(connection)
            self._at_hand.append(name)
        else:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Lend it no more."""
        self._made.pop(name, None)
        if (connection := self._connections.pop(name, None)) is not None:
            connection.close()
        self.admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def close(self) -> None:
        """Drop what was made."""
        for name in list(self._made):
            self.drop(name)

    def _connected(self, name: str) -> psycopg.Connection[Any]:
        """A connection that is kept, for what a new one has to read first costs more than what it is asked."""
        kept = self._connections.get(name)
        with suppress(OperationalError):  # the test has ended all there were
            if kept is not None:
                kept.execute("SELECT")
                return kept
        url = self.server.set(drivername="postgresql", database=name)
        address = url.render_as_string(hide_password=False)
        self._connections[name] = psycopg.connect(address, autocommit=True, application_name=KEPT)
        return self._connections[name]

    async def _nobody_is_connected(self, name: str, but: int) -> None:
        query = (
            "SELECT count(*), string_agg(application_name || ': ' || left(query, 80), '; ') FROM pg_stat_activity"
            " WHERE datname = %s AND backend_type = 'client backend' AND pid <> %s"
        )
        left, who = 1, ""
        for _ in range(_LOOKS):  # a closed connection's backend needs a moment to end
            ((left, who),) = self.admin.execute(query, [name, but]).fetchall()
            if not left:
                return
            await asyncio.sleep(_BETWEEN_LOOKS)
        raise AssertionError(f"the test left {left} connections open: {who}")


def _catalogs(connection: psycopg.Connection[Any]) -> frozenset[tuple[Any, ...]]:
    """What tells a schema from the same one after any change: how many rows each catalog has, and its newest."""
    return frozenset(connection.execute(f"{_NEWEST} UNION ALL {_REST}").fetchall())


def _size(connection: psycopg.Connection[Any]) -> int:
    ((size,),) = connection.execute(f"SELECT sum(pg_total_relation_size(oid))::bigint {_OURS}").fetchall()
    return int(size or 0)


def _nothing_runs(connection: psycopg.Connection[Any]) -> None:
    try:
        names = connection.execute("SELECT name FROM exarq.job WHERE state = 'running'").fetchall()
    except UndefinedTable:  # the test has dropped it
        return
    assert not names, f"the test left jobs running: {names}"
