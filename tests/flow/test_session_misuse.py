"""What jobs do wrong with sessions: their attempt fails with advice, and no other job notices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.flow.helpers import NAME, a_work_with, claimed, note, notes, run_job, run_new, start
from tests.support import a_job, attempts, row, state
from worker.core.context import JobContext
from worker.settings import Settings

pytestmark = pytest.mark.usefixtures("note_table")

# ── shared ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_job_that_shares_its_session_in_a_task_group_is_told_what_to_do(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(session: AsyncSession) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(note(session, "a"), name="first writer")
            group.create_task(note(session, "b"))

    async with a_work_with(settings, job, max_attempts=1) as work:
        job_id = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job_id)
        task = start(work, run)
        task.set_name("the job's own task")
        await task

    error = (await row(engine, job_id)).error
    assert f"task 'first writer' (runs note) used the session of job {job_id}" in error
    assert "belongs to task 'the job's own task'" in error or 'belongs to task "the job\'s own task"' in error
    assert 'async with ctx["sessions"].begin() as own' in error
    assert await notes(engine) == []


async def test_a_session_that_got_into_the_hands_of_another_job_serves_neither(
    engine: AsyncEngine, settings: Settings
) -> None:
    at_hand: list[AsyncSession] = []
    used = asyncio.Event()

    async def job(session: AsyncSession) -> None:
        if at_hand:  # as from a module's global
            try:
                await note(at_hand[0], "through the other's")
            finally:
                used.set()
        else:
            at_hand.append(session)
            await note(session, "its own")
            await used.wait()

    async with a_work_with(settings, job, max_attempts=1) as work:
        ids = [await a_job(engine, name=NAME) for _ in range(2)]
        await asyncio.gather(*(start(work, run) for run in await claimed(work, *ids)))
        errors = [(await row(engine, job_id)).error for job_id in ids]
        at_hand.clear()
        third, _ = await run_new(work, engine, args={})

    assert all(f"used the session of job {ids[0]}" in error for error in errors)
    assert await notes(engine) == ["its own"]
    assert await state(engine, third) == "succeeded"


# ── left open ───────────────────────────────────────────────────────────────────────────────────────────────────────

kept: list[Any] = []  # as a module's global keeps it, so that nothing is tidied up by being forgotten


async def leaves_a_session_that_wrote(ctx: JobContext) -> None:
    own = ctx["sessions"]()
    kept.append(own)
    await note(own, "lost")


async def leaves_a_session_that_read(ctx: JobContext) -> None:
    own = ctx["sessions"]()
    kept.append(own)
    await own.execute(select(1))


async def leaves_a_connection(ctx: JobContext) -> None:
    connection = await ctx["engine"].connect()
    kept.append(connection)
    await connection.execute(text("SELECT pg_advisory_lock(7)"))


async def leaves_one_in_a_task_that_has_ended(ctx: JobContext) -> None:
    await asyncio.gather(leaves_a_session_that_wrote(ctx))


async def leaves_one_besides_its_own(ctx: JobContext) -> None:
    await note(ctx.session, "rolled back")
    await leaves_a_session_that_wrote(ctx)


LEFT = [
    leaves_a_session_that_wrote,
    leaves_a_session_that_read,
    leaves_a_connection,
    leaves_one_in_a_task_that_has_ended,
    leaves_one_besides_its_own,
]


@pytest.mark.parametrize("job", LEFT, ids=lambda job: job.__name__)
async def test_what_a_job_left_open_fails_its_attempt_and_is_ended(
    engine: AsyncEngine, settings: Settings, job: Callable[[JobContext], Awaitable[None]]
) -> None:
    async with a_work_with(settings, job, max_attempts=1) as work:
        job_id, _ = await run_new(work, engine)

        assert "Current Checked out connections: 0" in work.jobs_engine.pool.status()
    kept.clear()
    (attempt,) = await attempts(engine, job_id)
    assert attempt.error.startswith("worker.core.errors.SessionLeftOpen: ")
    assert 'async with ctx["sessions"].begin() as own' in attempt.error
    assert await notes(engine) == []


async def test_a_job_that_raised_keeps_its_own_error_and_what_it_left_open_is_ended(
    engine: AsyncEngine, settings: Settings
) -> None:
    async def job(ctx: JobContext) -> None:
        await leaves_a_session_that_wrote(ctx)
        raise ValueError("of my own")

    async with a_work_with(settings, job, max_attempts=1) as work:
        job_id, _ = await run_new(work, engine)

        assert "Current Checked out connections: 0" in work.jobs_engine.pool.status()
    kept.clear()
    assert (await row(engine, job_id)).error == "ValueError: of my own"


async def closes(ctx: JobContext) -> None:
    async with ctx["sessions"]() as own:
        await note(own, "own")
        await own.commit()


async def commits_and_keeps_the_object(ctx: JobContext) -> None:
    own = ctx["sessions"]()
    kept.append(own)
    await note(own, "own")
    await own.commit()


async def has_a_task_that_still_works_with_its_own(ctx: JobContext) -> None:
    at_work, go_on = asyncio.Event(), asyncio.Event()

    async def works() -> None:
        async with ctx["sessions"].begin() as own:
            await note(own, "own")
            at_work.set()
            await go_on.wait()

    kept.append((asyncio.create_task(works()), go_on))
    await at_work.wait()


@pytest.mark.parametrize(
    "job",
    [closes, commits_and_keeps_the_object, has_a_task_that_still_works_with_its_own],
    ids=lambda job: job.__name__,
)
async def test_a_session_of_its_own_that_is_not_left_open_is_nobodys_concern(
    engine: AsyncEngine, settings: Settings, job: Callable[[JobContext], Awaitable[None]]
) -> None:
    async with a_work_with(settings, job, max_attempts=1) as work:
        job_id, _ = await run_new(work, engine)
        for one in kept:
            if isinstance(one, tuple):
                task, go_on = one
                go_on.set()
                await task

    kept.clear()
    assert await state(engine, job_id) == "succeeded"
    assert await notes(engine) == ["own"]


async def test_a_session_open_in_another_job_is_that_jobs_concern(engine: AsyncEngine, settings: Settings) -> None:
    opened, seen = asyncio.Event(), asyncio.Event()

    async def job(ctx: JobContext) -> None:
        if opened.is_set():
            await note(ctx.session, "second")
            return
        async with ctx["sessions"].begin() as own:
            await note(own, "first")
            opened.set()
            await seen.wait()

    async with a_work_with(settings, job, max_attempts=1) as work:
        first = asyncio.create_task(run_job(work, await a_job(engine, name=NAME)))
        await opened.wait()
        second, _ = await run_new(work, engine)
        seen.set()
        job_id = (await first).claimed.held.job_id

    assert [await state(engine, one) for one in (job_id, second)] == ["succeeded", "succeeded"]
    assert await notes(engine) == ["first", "second"]
