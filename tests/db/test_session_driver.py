"""What a job leaves on the driver's own connection: it is gone, or the connection is, before the next job has it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.db.attempts import an_attempt, run, words
from tests.db.moves import a_held_job
from tests.db.session_cases import write
from worker.core.errors import TransactionAborted, TransactionEscaped
from worker.flow.work import Work

pytestmark = [pytest.mark.leaves_running, pytest.mark.usefixtures("note_table")]


async def driver_of(session: AsyncSession) -> Any:
    return (await (await session.connection()).get_raw_connection()).driver_connection


async def sets(session: AsyncSession) -> None:
    driver = await driver_of(session)
    await driver.execute("SET search_path TO nowhere")


async def opens_a_cursor(session: AsyncSession) -> None:
    driver = await driver_of(session)
    cursor = await driver.cursor("SELECT generate_series(1, 1000)")
    await cursor.fetch(10)


async def begins_a_savepoint(session: AsyncSession) -> None:
    driver = await driver_of(session)
    await driver.transaction().start()


async def prepares(session: AsyncSession) -> None:
    await session.execute(text("/* once */ PREPARE left_behind AS SELECT 1"))


async def listens(session: AsyncSession) -> None:
    driver = await driver_of(session)
    await driver.add_listener("left_behind", print)


async def hears_log_messages(session: AsyncSession) -> None:
    driver = await driver_of(session)
    driver.add_log_listener(print)


LEFT = [sets, opens_a_cursor, begins_a_savepoint, prepares, listens, hears_log_messages]


@pytest.mark.parametrize("leaves", LEFT, ids=lambda body: body.__name__)
async def test_what_a_job_left_on_its_connection_or_its_driver_is_gone_for_the_next(
    work: Work, engine: AsyncEngine, leaves: Any
) -> None:
    first, second = await a_held_job(engine), await a_held_job(engine)

    async def leaving(session: AsyncSession) -> None:
        await write(session, "a")
        await leaves(session)
        await session.execute(text("SET LOCAL search_path TO public"))

    async def following(session: AsyncSession) -> None:
        driver = await driver_of(session)
        assert not driver._listeners
        assert not driver._log_listeners
        await session.execute(text("PREPARE left_behind AS SELECT 1"))
        assert (await session.execute(text("SHOW search_path"))).scalar() == '"$user", public'
        await write(session, "b")

    assert await run(work, first, leaving)
    assert await run(work, second, following)
    assert await words(engine) == {"a", "b"}


async def test_a_transaction_that_the_job_began_on_the_driver_hides_no_lost_commit_and_reaches_no_other_job(
    work: Work, engine: AsyncEngine
) -> None:
    first, second = await a_held_job(engine), await a_held_job(engine)

    async def around(session: AsyncSession) -> None:
        await begins_a_savepoint(session)  # before the session has begun: it is the transaction, and ours a savepoint
        await write(session, "lost")

    async def following(session: AsyncSession) -> None:
        await write(session, "kept")

    with pytest.raises(TransactionEscaped, match="went on after its COMMIT"):
        await run(work, first, around)
    assert await run(work, second, following)

    assert await words(engine) == {"kept"}


async def test_a_transaction_that_the_job_began_on_the_driver_and_that_was_aborted_reaches_no_other_job(
    work: Work, engine: AsyncEngine
) -> None:
    first, second = await a_held_job(engine), await a_held_job(engine)

    async def around(session: AsyncSession) -> None:
        await begins_a_savepoint(session)
        with contextlib.suppress(DBAPIError):
            await session.execute(text("SELECT 1/0"))

    async def following(session: AsyncSession) -> None:
        await write(session, "kept")

    with pytest.raises(TransactionAborted):
        await run(work, first, around)
    assert await run(work, second, following)

    assert await words(engine) == {"kept"}


async def test_a_copy_that_is_still_under_way_fails_the_attempt_and_its_connection_is_not_used_again(
    work: Work, engine: AsyncEngine
) -> None:
    first, second = await a_held_job(engine), await a_held_job(engine)
    pids: list[int | None] = []
    tasks: list[asyncio.Task[Any]] = []
    under_way = asyncio.Event()

    async def never_ends(_data: bytes) -> None:
        under_way.set()
        await asyncio.Event().wait()

    async def leaving(session: AsyncSession) -> None:
        driver = await driver_of(session)
        copy = driver.copy_from_query("SELECT generate_series(1, 100000)", output=never_ends)
        tasks.append(asyncio.create_task(copy))
        await under_way.wait()

    async with an_attempt(work) as attempt:
        await leaving(attempt.session())
        pids.append(attempt.transaction.backend_pid)
        with pytest.raises(DBAPIError, match="is in progress"):
            await attempt.commit_success(first, "1")
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

    async with an_attempt(work) as attempt:
        await write(attempt.session(), "b")
        pids.append(attempt.transaction.backend_pid)
        assert await attempt.commit_success(second, "1")
    assert pids[0] != pids[1]
    assert await words(engine) == {"b"}
