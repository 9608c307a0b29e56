"""What an error says about the database, each with its real cause."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta

import asyncpg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tests.support import a_job, until
from worker.db.engine import processor_engine
from worker.db.failures import is_aborted, is_away, is_contention, is_transient, sqlstate_of

Cause = Callable[[AsyncEngine], Awaitable[object]]


async def a_terminated_backend(engine: AsyncEngine) -> None:
    async with engine.connect() as victim, engine.connect() as other:
        pid = (await victim.execute(text("SELECT pg_backend_pid()"))).scalar()
        await other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        await victim.execute(text("SELECT 1"))


async def a_connection_that_is_being_ended(engine: AsyncEngine) -> None:
    """Its last words have arrived and its end has not been seen: what is sent between the two meets no server."""
    async with engine.connect() as victim:
        pid = (await victim.execute(text("SELECT pg_backend_pid()"))).scalar()
        await victim.rollback()
        # Both wait in the kernel until the loop goes on; it reads the words in its next round, the end in the one after.
        blocking = create_engine(engine.url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
        with blocking.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        for _ in range(2):
            await asyncio.sleep(0)
        await victim.execute(text("SELECT 1"))


async def a_refused_port(engine: AsyncEngine) -> None:
    nobody = create_async_engine(make_url("postgresql+asyncpg://postgres@127.0.0.1:1/postgres"))
    async with nobody.connect():
        pass


async def a_silent_port(engine: AsyncEngine) -> None:
    async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await _reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    silent = processor_engine(
        f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres?ssl=disable",
        application_name=lambda: "exarq",
        connections=1,
        connect_timeout=timedelta(milliseconds=200),
        statement_timeout=timedelta(seconds=1),
    )
    async with server, silent.connect():
        pass


async def an_idle_transaction(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar()
        await connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 50"))
        await until(lambda: _has_ended(engine, pid), "the server ends the connection")
        await connection.execute(text("SELECT 1"))


async def _has_ended(engine: AsyncEngine, pid: object) -> bool:
    async with engine.connect() as connection:
        query = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
        return not (await connection.execute(query, {"pid": pid})).scalar_one()


async def a_statement_timeout(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SET LOCAL statement_timeout = 50"))
        await connection.execute(text("SELECT pg_sleep(30)"))


async def a_lock_timeout(engine: AsyncEngine) -> None:
    async with engine.connect() as holder, engine.connect() as connection:
        await holder.execute(text("LOCK TABLE exarq.job"))
        await connection.execute(text("SET LOCAL lock_timeout = 50"))
        await connection.execute(text("SELECT count(*) FROM exarq.job"))


async def a_deadlock(engine: AsyncEngine) -> None:
    ids = [await a_job(engine), await a_job(engine)]
    lock = text("SELECT 1 FROM exarq.job WHERE id = :id FOR NO KEY UPDATE")
    async with engine.connect() as one, engine.connect() as two:
        await one.execute(lock, {"id": ids[0]})
        await two.execute(lock, {"id": ids[1]})
        # Both: a connection that is closed while its statement still runs raises something else.
        ends = await asyncio.gather(
            one.execute(lock, {"id": ids[1]}), two.execute(lock, {"id": ids[0]}), return_exceptions=True
        )
    raise next(end for end in ends if isinstance(end, BaseException))


async def a_serialization_failure(engine: AsyncEngine) -> None:
    job_id = await a_job(engine)
    async with engine.connect() as plain, engine.connect() as other:
        strict = await plain.execution_options(isolation_level="REPEATABLE READ")
        await strict.execute(text("SELECT count(*) FROM exarq.job"))
        await other.execute(text("UPDATE exarq.job SET name = 'other' WHERE id = :id"), {"id": job_id})
        await other.commit()
        await strict.execute(text("UPDATE exarq.job SET name = 'mine' WHERE id = :id"), {"id": job_id})


async def an_aborted_transaction(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        with suppress(DBAPIError):
            await connection.execute(text("SELECT 1/0"))
        await connection.execute(text("SELECT 1"))


async def data_that_the_server_refuses(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT CAST(CAST(:json AS text) AS jsonb)"), {"json": '"\\u0000"'})


async def data_that_the_driver_cannot_encode(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT CAST(:number AS integer)"), {"number": "seven"})


async def a_text_that_the_driver_cannot_encode(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT CAST(:word AS text)"), {"word": "\ud800"})


async def met(engine: AsyncEngine, cause: Cause) -> BaseException:
    with pytest.raises((DBAPIError, OSError)) as caught:
        await cause(engine)
    return caught.value


@pytest.mark.parametrize(
    "cause",
    [a_terminated_backend, a_connection_that_is_being_ended, a_refused_port, a_silent_port, an_idle_transaction],
    ids=lambda cause: cause.__name__,
)
async def test_a_server_that_did_not_answer_is_away(engine: AsyncEngine, cause: Cause) -> None:
    error = await met(engine, cause)

    assert (is_away(error), is_contention(error), is_transient(error)) == (True, False, True)


@pytest.mark.parametrize(
    "cause", [a_lock_timeout, a_deadlock, a_serialization_failure], ids=lambda cause: cause.__name__
)
async def test_a_server_that_gave_up_because_of_others_is_contended(engine: AsyncEngine, cause: Cause) -> None:
    error = await met(engine, cause)

    assert (is_away(error), is_contention(error), is_transient(error)) == (False, True, True)


@pytest.mark.parametrize(
    "cause",
    [
        an_aborted_transaction,
        data_that_the_server_refuses,
        data_that_the_driver_cannot_encode,
        a_text_that_the_driver_cannot_encode,
    ],
    ids=lambda cause: cause.__name__,
)
async def test_what_would_fail_again_is_not_sent_again(engine: AsyncEngine, cause: Cause) -> None:
    error = await met(engine, cause)

    assert not is_transient(error)
    assert is_aborted(error) == (cause is an_aborted_transaction)


async def test_a_server_that_was_too_slow_is_asked_again(engine: AsyncEngine) -> None:
    error = await met(engine, a_statement_timeout)

    assert (is_away(error), is_contention(error), is_transient(error)) == (False, False, True)


@pytest.mark.parametrize("error", [asyncpg.DataError("a number is missing"), ValueError("x"), asyncio.CancelledError()])
def test_an_error_of_the_program_is_not_the_databases(error: BaseException) -> None:
    assert not is_transient(error)
    assert sqlstate_of(error) in (None, "22000")
