"""Engines: connections that say who they are, whose waits are limited, and that notice a peer that is gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.servers import TestServers
from tests.support import until
from worker.db.engine import jobs_engine, processor_engine
from worker.db.failures import sqlstate_of

NAMES = ["exarq one"]
SECOND = timedelta(seconds=1)


@pytest.fixture
async def processor(database_url: str) -> AsyncIterator[AsyncEngine]:
    NAMES[:] = ["exarq one"]
    engine = processor_engine(
        database_url,
        application_name=lambda: NAMES[-1],
        connections=2,
        connect_timeout=SECOND * 5,
        statement_timeout=SECOND,
    )
    yield engine
    await engine.dispose()


@pytest.fixture
async def jobs(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = jobs_engine(database_url, application_name=lambda: "exarq jobs", connections=1, connect_timeout=SECOND * 5)
    yield engine
    await engine.dispose()


async def setting(engine: AsyncEngine, name: str) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(text("SELECT current_setting(:name)"), {"name": name})).scalar()


async def pid_of(connection: AsyncConnection) -> Any:
    return (await connection.execute(text("SELECT pg_backend_pid()"))).scalar()


async def test_a_connection_says_who_it_is_and_a_later_one_says_the_new_name(processor: AsyncEngine) -> None:
    first = await setting(processor, "application_name")
    NAMES.append("exarq two")
    await processor.dispose()

    second = await setting(processor, "application_name")

    assert (first, second) == ("exarq one", "exarq two")


async def test_our_own_statements_have_limits_on_the_server(processor: AsyncEngine) -> None:
    names = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]

    found = [await setting(processor, name) for name in names]

    assert found == ["1s", "200ms", "1s"]


async def test_a_jobs_statements_have_no_limit_but_the_jobs_own(jobs: AsyncEngine) -> None:
    names = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]

    found = [await setting(jobs, name) for name in names]

    assert found == ["0", "0", "0"]


async def test_a_statement_of_ours_that_takes_too_long_is_ended(processor: AsyncEngine) -> None:
    async with processor.connect() as connection:
        with pytest.raises(DBAPIError) as caught:
            await connection.execute(text("SELECT pg_sleep(30)"))

    assert sqlstate_of(caught.value) == "57014"


async def test_a_job_waits_for_a_connection_as_long_as_it_takes(jobs: AsyncEngine) -> None:
    async with AsyncExitStack() as all_taken:
        for _ in range(1 + 4):  # the slot's, and those for second sessions
            await all_taken.enter_async_context(jobs.connect())
        waiting = asyncio.create_task(setting(jobs, "application_name"))
        _, still_waiting = await asyncio.wait([waiting], timeout=0.2)

    assert still_waiting
    assert await waiting == "exarq jobs"


async def test_a_pooled_connection_whose_server_end_is_gone_is_replaced_without_an_error(
    processor: AsyncEngine, engine: AsyncEngine
) -> None:
    async with processor.connect() as connection:
        before = await pid_of(connection)
        raw = await connection.get_raw_connection()
        driver: Any = raw.driver_connection
    async with engine.connect() as other:
        await other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": before})
    await until(driver.is_closed, "our end has seen it")

    async with processor.connect() as connection:
        after = await pid_of(connection)

    assert before != after


async def test_a_tcp_connection_finds_out_that_its_peer_is_gone(servers: TestServers, processor: AsyncEngine) -> None:
    async with processor.connect() as connection:
        raw = await connection.get_raw_connection()
        sock = raw.driver_connection._transport.get_extra_info("socket")  # type: ignore[union-attr]  # it is connected
        if sock.family == socket.AF_UNIX:
            host = make_url(servers.admin_url).query.get("host") or servers.admin_url.host
            assert host is None or str(host).startswith("/")  # nothing to watch: no network lies between
            return

        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
        assert await setting(processor, "tcp_user_timeout") in ("10s", "10000")  # it is shown as the system has it
        assert await setting(processor, "tcp_keepalives_idle") == "5"


async def test_behind_a_pooler_a_connection_has_a_name_and_leaves_nothing_on_its_backend(database_url: str) -> None:
    engine = processor_engine(
        database_url,
        application_name=lambda: "exarq pooled",
        connections=1,
        connect_timeout=SECOND * 5,
        statement_timeout=SECOND,
        pooler="pgbouncer",
    )
    async with engine.connect() as connection:
        for _ in range(2):
            await connection.execute(text("SELECT 1"))
        left = text("SELECT name FROM pg_prepared_statements WHERE name <> ''")
        assert (await connection.execute(left)).all() == []
        assert (await connection.get_raw_connection()).info == {"exarq.named": "exarq pooled", "exarq.reset": ""}
    found = [await setting(engine, name) for name in ("application_name", "statement_timeout", "tcp_user_timeout")]
    await engine.dispose()

    assert found == ["exarq pooled", "0", "0"]
