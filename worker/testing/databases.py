"""Databases for tests: copies of a template, on the server that is configured or on a private one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from uuid import uuid4

import asyncpg
from sqlalchemy import Connection, NullPool, make_url
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine

from worker.db import migrate
from worker.embedded import servers

NAME_PREFIX: Final = "exarq_test_"
"""What the name of every database begins with that was made here."""

T = TypeVar("T")
Prepare = Callable[[Connection], object]


@dataclass(frozen=True)
class Databases:
    """A template with Exarq's tables and the user's, and databases copied from it, whose names say whose they are."""

    server: URL
    template: str

    @contextmanager
    def copy(self) -> Iterator[str]:
        """A database for the length of the block; yields its address."""
        name = new_name()
        self.sql(f"CREATE DATABASE {name} TEMPLATE {self.template}")
        try:
            yield self.server.set(database=name).render_as_string(hide_password=False)
        finally:
            self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    def sql(self, statement: str) -> None:
        """Run one statement outside of the databases of tests."""
        finished(_execute(self.server, statement))


@contextmanager
def databases(prepare: Prepare, url: str | None = None) -> Iterator[Databases]:
    """A template, prepared, and what is needed to copy it; only databases made here are ever touched.

    Args:
        prepare: called once with a connection to the template, in a transaction, after Exarq's own tables are made.
        url: a database of the server, as a user who may create others; without one, a private server is started.

    """
    with ExitStack() as stack:
        if url is None:
            url = stack.enter_context(servers.running(fsync=False, redis=False)).database_url
        server, template = make_url(url).set(drivername="postgresql+asyncpg"), new_name()
        found = Databases(server, template)
        found.sql(f"CREATE DATABASE {template}")
        stack.callback(found.sql, f"DROP DATABASE {template} WITH (FORCE)")
        finished(_fill(server.set(database=template), prepare))
        yield found


def new_name() -> str:
    """A name that no other database has."""
    return f"{NAME_PREFIX}{os.getpid()}_{uuid4().hex[:12]}"


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a loop of its own, in a thread of its own: the test's loop may be running."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def _fill(template: URL, prepare: Prepare) -> None:
    engine = create_async_engine(template, poolclass=NullPool)
    await migrate.upgrade(engine)
    async with engine.begin() as connection:
        await connection.run_sync(prepare)


async def _execute(server: URL, statement: str) -> None:
    connection = await asyncpg.connect(server.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
