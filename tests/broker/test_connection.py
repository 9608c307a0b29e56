"""Every wait for Redis has a limit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from tests.proxy import redis_proxy
from tests.servers import TestServers
from worker.broker.connection import UNREACHABLE, connect
from worker.broker.keys import queue_key

SHORT = timedelta(milliseconds=200)


@pytest.fixture
async def silent_port() -> AsyncIterator[int]:
    """A server that accepts connections and never says a word."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(_reader: Any, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.transport.abort()
    await server.wait_closed()


async def test_a_server_that_accepts_and_never_answers_is_given_up(silent_port: int) -> None:
    redis = connect(f"redis://127.0.0.1:{silent_port}/0", timeout=SHORT)

    async with asyncio.timeout(20):
        with pytest.raises(UNREACHABLE):
            await redis.ping()

    await redis.aclose()


async def test_a_server_that_falls_silent_between_two_questions_is_given_up(servers: TestServers, redis: Any) -> None:
    async with redis_proxy(servers.redis_url) as (proxy, url):
        client = connect(url, timeout=timedelta(seconds=2))  # in which a loaded machine must answer the first
        await client.ping()
        proxy.silence()

        async with asyncio.timeout(20):
            with pytest.raises(UNREACHABLE):
                await client.zcard(queue_key("default"))

        await client.aclose()


async def test_a_full_pool_is_waited_for_no_longer_than_an_answer(silent_port: int) -> None:
    redis = connect(f"redis://127.0.0.1:{silent_port}/0", timeout=SHORT, connections=1)

    async with asyncio.timeout(20):
        errors = await asyncio.gather(redis.ping(), redis.ping(), redis.ping(), return_exceptions=True)

    assert all(isinstance(error, UNREACHABLE) for error in errors), errors
    await redis.aclose()


async def test_a_closed_port_is_told_as_unreachable() -> None:
    with socket.socket() as taken:  # and not listening: a port given back may become somebody else's
        taken.bind(("127.0.0.1", 0))
        redis = connect(f"redis://127.0.0.1:{taken.getsockname()[1]}/0", timeout=SHORT)

        with pytest.raises(UNREACHABLE):
            await redis.ping()

        await redis.aclose()
