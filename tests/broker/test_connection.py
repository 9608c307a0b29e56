"""Every wait for Redis has a limit, and no answer is taken for that to another question."""

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


async def test_a_question_too_long_for_the_kernel_is_given_up_too(servers: TestServers) -> None:
    async with redis_proxy(servers.redis_url) as (proxy, url):
        client = connect(url, timeout=timedelta(seconds=2))
        await client.ping()
        proxy.silence()

        async with asyncio.timeout(20):
            with pytest.raises(UNREACHABLE):
                await client.set("long", b" " * 20_000_000)

        await client.aclose()


async def test_a_question_too_long_for_the_kernel_arrives(redis: Any, redis_url: str) -> None:
    client = connect(redis_url, timeout=timedelta(seconds=20))

    await client.set("long", b" " * 20_000_000)

    assert await redis.strlen("long") == 20_000_000
    await client.aclose()


async def test_a_connection_that_has_ended_meanwhile_is_made_anew(servers: TestServers, redis: Any) -> None:
    async with redis_proxy(servers.redis_url) as (proxy, url):
        client = connect(url, timeout=timedelta(seconds=15))
        await client.ping()
        proxy.cut()
        await redis.ping()  # so long it takes the event loop to learn of it

        assert await client.ping()
        await client.aclose()


@pytest.mark.parametrize("moment", ["behind an answer", "later", "the end"])
async def test_what_nobody_asked_for_is_no_answer_to_the_next_question(moment: str) -> None:
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while asked := await reader.read(65_536):
            is_first = writer is writers[0] and moment == "behind an answer"
            writer.write(b"+PONG\r\n" * asked.count(b"*") + (b":7\r\n" if b"PING" in asked and is_first else b""))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    redis, other = connect(url, timeout=timedelta(seconds=15)), connect(url, timeout=timedelta(seconds=15))
    await redis.ping()
    if moment == "later":
        writers[0].write(b":7\r\n")
    elif moment == "the end":
        writers[0].write_eof()
    await other.ping()  # so long it takes the event loop to learn of it

    assert await redis.ping() is True
    assert len(writers) == 3  # over a new connection

    await redis.aclose()
    await other.aclose()
    server.close()
    for writer in writers:
        writer.transport.abort()
    await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
    await server.wait_closed()


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
