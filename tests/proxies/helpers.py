"""Connections through a proxy whose every byte the test decides, and what PostgreSQL knows of its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg

from tests.databases import KEPT
from tests.proxy import Proxy

Connect = Callable[[], Awaitable[asyncpg.Connection]]
Raw = tuple[asyncio.StreamReader, asyncio.StreamWriter]

HUNG_UP = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)


@asynccontextmanager
async def raw(proxy: Proxy, select: bytes = b"") -> AsyncIterator[Raw]:
    """A connection whose every byte the test decides."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        if select:
            writer.write(select)
            assert await reader.readline() == b"+OK\r\n"
        yield reader, writer
    finally:
        writer.transport.abort()


async def pong(line: Raw) -> bytes:
    """Ask Redis for a sign of life; what comes back."""
    line[1].write(b"PING\r\n")
    return await line[0].readline()


async def backends(direct: asyncpg.Connection) -> int:
    """How many others PostgreSQL serves in this database."""
    return int(
        await direct.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            f" AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name <> '{KEPT}'"
        )
    )


async def words(direct: asyncpg.Connection) -> list[str]:
    return [row["word"] for row in await direct.fetch("SELECT word FROM note ORDER BY word")]


async def nothing_comes(*lines: Raw) -> None:
    waiting = [asyncio.create_task(line[0].readline()) for line in lines]
    done, late = await asyncio.wait(waiting, timeout=0.3)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    assert not done


async def runs(direct: asyncpg.Connection, what: str) -> bool:
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND state = 'active' AND query LIKE $1 AND pid <> pg_backend_pid()"
    )
    return bool(await direct.fetchval(query, f"%{what}%"))


async def is_zero(number: Awaitable[int]) -> bool:
    return await number == 0
