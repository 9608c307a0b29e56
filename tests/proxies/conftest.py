from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from tests.proxies.helpers import Connect
from tests.proxy import Proxy, postgres_proxy, redis_proxy


@pytest.fixture
async def proxied(database_url: str) -> AsyncIterator[tuple[Proxy, Connect]]:
    """A proxy before PostgreSQL, and how to connect through it."""
    async with AsyncExitStack() as stack:
        proxy, url = await stack.enter_async_context(postgres_proxy(database_url))
        dsn = make_url(url).set(drivername="postgresql", query={}).render_as_string(hide_password=False)

        async def connect() -> asyncpg.Connection:
            connection = await asyncpg.connect(dsn, ssl=False, timeout=10)
            stack.callback(connection.terminate)
            return connection

        yield proxy, connect


@pytest.fixture
async def direct(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection past the proxy, in a database with a table `note`."""
    dsn = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE TABLE note (word text PRIMARY KEY)")
    yield connection
    await connection.close()


@pytest.fixture
async def near_redis(redis_url: str) -> AsyncIterator[Proxy]:
    """A proxy before Redis."""
    async with redis_proxy(redis_url) as (proxy, _):
        yield proxy


@pytest.fixture
def select(redis_url: str) -> bytes:
    """What a connection to Redis asks first: to use the database of the tests."""
    return b"SELECT %s\r\n" % re.findall(r"\d+$", redis_url)[0].encode()
