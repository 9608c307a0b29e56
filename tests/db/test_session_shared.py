"""An attempt's session serves one task: every use by another is refused, wherever the other task came from."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.db.attempts import an_attempt, run, words
from tests.db.moves import a_held_job
from tests.db.session_cases import Body, Note, add, write
from tests.support import row
from worker.core.errors import SessionShared, TransactionEscaped
from worker.core.states import JobState
from worker.flow.work import Work

pytestmark = [pytest.mark.leaves_running, pytest.mark.usefixtures("note_table")]

Use = Callable[[AsyncSession, Note], Awaitable[Any]]

# ── what the other task does ────────────────────────────────────────────────────────────────────────────────────────

USES: list[Use] = []


def use(body: Use) -> Use:
    USES.append(body)
    return body


@use
async def executes(session: AsyncSession, _note: Note) -> None:
    await write(session, "b")


@use
async def adds(session: AsyncSession, _note: Note) -> None:
    add(session, "b")


@use
async def flushes(session: AsyncSession, _note: Note) -> None:
    await session.flush()


@use
async def commits(session: AsyncSession, _note: Note) -> None:
    await session.commit()


@use
async def rolls_back(session: AsyncSession, _note: Note) -> None:
    await session.rollback()


@use
async def begins_a_savepoint(session: AsyncSession, _note: Note) -> None:
    await session.begin_nested()


@use
async def takes_the_connection(session: AsyncSession, _note: Note) -> None:
    await session.connection()


@use
async def gets_what_is_there_already(session: AsyncSession, _note: Note) -> None:
    await session.get(Note, "a")


@use
async def deletes(session: AsyncSession, note: Note) -> None:
    await session.delete(note)


@use
async def refreshes(session: AsyncSession, note: Note) -> None:
    await session.refresh(note)


@use
async def merges(session: AsyncSession, _note: Note) -> None:
    await session.merge(Note(word="a"))


@use
async def streams(session: AsyncSession, _note: Note) -> None:
    await session.stream(text("SELECT 1"))


@use
async def runs_sync_code(session: AsyncSession, _note: Note) -> None:
    await session.run_sync(lambda sync: sync.execute(text("SELECT 1")))


@use
async def closes(session: AsyncSession, _note: Note) -> None:
    await session.close()


@use
async def resets(session: AsyncSession, _note: Note) -> None:
    await session.reset()


async def test_every_use_by_another_task_is_refused_and_fails_the_attempt_even_where_the_job_hides_it(
    work: Work, engine: AsyncEngine
) -> None:
    held = await a_held_job(engine)

    for other in USES:
        said: list[Any] = []

        async def body(session: AsyncSession, other: Use = other, said: list[Any] = said) -> None:
            note = Note(word="a")
            session.add(note)
            await session.flush()
            said.extend(await asyncio.gather(other(session, note), return_exceptions=True))

        with pytest.raises(SessionShared, match=f"runs {other.__name__}"):
            await run(work, held, body)
        assert [type(one) for one in said] == [SessionShared], other.__name__

    assert await words(engine) == set()
    assert (await row(engine, held.job_id)).state == JobState.RUNNING


async def test_a_connection_of_the_session_serves_no_other_task_either(work: Work, engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    async def body(session: AsyncSession) -> None:
        connection = await session.connection()
        await asyncio.gather(connection.execute(text("SELECT 1")))

    with pytest.raises(SessionShared):
        await run(work, held, body)


# ── where the other task comes from ─────────────────────────────────────────────────────────────────────────────────


async def gathered(session: AsyncSession) -> None:
    await asyncio.gather(write(session, "b"), write(session, "c"))


async def in_a_task_group(session: AsyncSession) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(write(session, "b"))
            group.create_task(write(session, "c"))
    except* SessionShared as group_error:
        raise group_error.exceptions[0] from None


async def in_a_task_nobody_waits_for(session: AsyncSession) -> None:
    task = asyncio.create_task(write(session, "b"))
    await asyncio.wait({task})


async def shielded(session: AsyncSession) -> None:
    await asyncio.shield(write(session, "b"))


async def in_a_thread(session: AsyncSession) -> None:
    await asyncio.to_thread(session.sync_session.execute, text("SELECT 1"))


async def in_a_callback_of_the_loop(session: AsyncSession) -> None:
    called = asyncio.Event()

    def callback() -> None:
        with contextlib.suppress(SessionShared):
            add(session, "b")
        called.set()

    asyncio.get_running_loop().call_soon(callback)
    await called.wait()


WAYS: list[Body] = [
    gathered,
    in_a_task_group,
    in_a_task_nobody_waits_for,
    shielded,
    in_a_thread,
    in_a_callback_of_the_loop,
]


@pytest.mark.parametrize("body", WAYS, ids=lambda body: body.__name__)
async def test_another_task_is_refused_wherever_it_comes_from_and_the_next_job_is_untouched(
    work: Work, engine: AsyncEngine, body: Body
) -> None:
    held, following = await a_held_job(engine), await a_held_job(engine)

    async def shares(session: AsyncSession) -> None:
        await write(session, "a")
        await body(session)

    async def goes_on(session: AsyncSession) -> None:
        await write(session, "next")

    with pytest.raises(SessionShared):
        await run(work, held, shares)
    await run(work, following, goes_on)

    assert await words(engine) == {"next"}
    assert work.jobs_engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # the pool's own, a queue


async def test_another_task_is_refused_before_the_owner_has_used_the_session(work: Work, engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    with pytest.raises(SessionShared):
        await run(work, held, in_a_task_nobody_waits_for)

    assert await words(engine) == set()


async def test_a_wait_with_a_limit_is_refused_only_where_it_starts_a_task_and_the_message_names_the_way(
    work: Work, engine: AsyncEngine
) -> None:
    held = await a_held_job(engine)

    async def body(session: AsyncSession) -> None:
        async with asyncio.timeout(30):
            await write(session, "a")
        await asyncio.wait_for(write(session, "b"), 30)

    if sys.version_info >= (3, 12):
        assert await run(work, held, body)
    else:
        with pytest.raises(SessionShared, match=r"asyncio\.timeout"):
            await run(work, held, body)


async def test_a_shielded_wait_is_refused_by_a_message_that_names_it(work: Work, engine: AsyncEngine) -> None:
    with pytest.raises(SessionShared, match=r"asyncio\.shield"):
        await run(work, await a_held_job(engine), shielded)


async def rows_of(session: AsyncSession, closed: asyncio.Event) -> AsyncGenerator[str, None]:
    try:
        yield "a"
        yield "b"
    finally:
        closed.set()
        await session.flush()


async def test_a_generator_left_before_its_end_is_refused_with_what_closes_it(work: Work, engine: AsyncEngine) -> None:
    closed = asyncio.Event()

    async def leaves_it(session: AsyncSession) -> None:
        async for word in rows_of(session, closed):
            await write(session, word)
            break
        await closed.wait()

    async def closes_it(session: AsyncSession) -> None:
        async with contextlib.aclosing(rows_of(session, closed)) as rows:
            async for word in rows:
                await write(session, word)
                break

    with pytest.raises(SessionShared, match=r"contextlib\.aclosing"):
        await run(work, await a_held_job(engine), leaves_it)
    assert await run(work, await a_held_job(engine), closes_it)
    assert await words(engine) == {"a"}


async def test_a_task_that_leaves_the_session_alone_is_welcome(work: Work, engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    async def fetches() -> str:
        async with work.sessions() as own:
            return str((await own.execute(text("SELECT 'a'"))).scalar_one())

    async def body(session: AsyncSession) -> None:
        for word in await asyncio.gather(fetches()):
            await write(session, word)

    assert await run(work, held, body)
    assert await words(engine) == {"a"}


# ── after the attempt ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_nothing_can_be_done_with_a_session_whose_attempt_has_ended(work: Work) -> None:
    async with an_attempt(work) as attempt:
        session = attempt.session()
        await write(session, "a")

    for other in USES:
        with pytest.raises(TransactionEscaped, match="the attempt has ended"):
            await other(session, Note(word="b"))
        with pytest.raises(SessionShared, match="the attempt has ended"):
            await asyncio.gather(other(session, Note(word="b")))

    assert not attempt.transaction.taken
