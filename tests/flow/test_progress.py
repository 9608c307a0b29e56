"""ctx.progress(): seen from outside while the job runs, and never in its way."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from tests.flow.helpers import NAME, a_work_with, claimed, note, run_job, start
from tests.support import a_job, a_locked_row, heard, row, until
from worker.core.context import JobContext, current_job
from worker.core.states import JobState
from worker.db import transitions
from worker.flow import progress
from worker.settings import Settings

pytestmark = pytest.mark.usefixtures("note_table")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored as soon as it is said."""
    monkeypatch.setattr(progress, "EVERY", timedelta(0))


async def said(engine: AsyncEngine, job: UUID) -> Any:
    return (await row(engine, job)).progress


async def test_it_is_seen_while_the_job_runs_and_holds_its_transaction_open(
    engine: AsyncEngine, settings: Settings
) -> None:
    gate = asyncio.Event()

    async def job(ctx: JobContext) -> None:
        await note(ctx.session, "a")
        ctx.progress(3, 7, "copying")
        await gate.wait()

    job_id = await a_job(engine, name=NAME)
    async with a_work_with(settings, job) as work:
        (run,) = await claimed(work, job_id)
        task = start(work, run)
        seen = await until(lambda: said(engine, job_id), "it is seen")
        assert (await row(engine, job_id)).state == JobState.RUNNING
        gate.set()
        await task

    found = await row(engine, job_id)
    assert seen == {"done": 3, "total": 7, "text": "copying", "attempt": 1, "at": seen["at"]}
    assert (found.state, found.progress) == ("succeeded", seen)


@pytest.mark.usefixtures("at_once")
async def test_of_many_words_few_are_stored_and_the_last_is(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, gate = 0, asyncio.Event()
    note_progress = transitions.note_progress

    async def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal stored
        stored += 1
        await note_progress(*args, **kwargs)

    async def job(ctx: JobContext) -> None:
        for done in range(10_000):
            ctx.progress(done, 10_000)
        await gate.wait()

    monkeypatch.setattr(transitions, "note_progress", counted)
    jobs = [await a_job(engine, name=NAME) for _ in range(3)]
    async with a_work_with(settings, job) as work:
        tasks = [start(work, run) for run in await claimed(work, *jobs)]

        async def last_words() -> bool:
            return [(await said(engine, one) or {}).get("done") for one in jobs] == [9_999] * 3

        await until(last_words, "the last word of each is stored")
        gate.set()
        await asyncio.gather(*tasks)
        await work.flusher.drain()

    assert stored <= 3


@pytest.mark.usefixtures("at_once")
async def test_a_legacy_job_and_a_thread_say_it_too(engine: AsyncEngine, settings: Settings) -> None:
    async def threaded(ctx: JobContext) -> None:
        await asyncio.to_thread(ctx.progress, 1, 2, "thread")
        await until(lambda: said(engine, ctx.job_id), "it is seen")

    def legacy(session: Session) -> None:
        context = current_job()
        assert context is not None
        context.progress(1, 2, "legacy")
        stored = text("SELECT pg_sleep(0.02), progress FROM exarq.job WHERE id = :job")
        while session.execute(stored, {"job": context.job_id}).one().progress is None:
            pass

    for fn, word in ((threaded, "thread"), (legacy, "legacy")):
        async with a_work_with(settings, fn) as work:
            job = await a_job(engine, name=NAME)
            await run_job(work, job)
        assert (await said(engine, job))["text"] == word


@pytest.mark.leaves_running
async def test_who_lost_the_job_changes_nothing_and_a_locked_row_keeps_nobody(engine: AsyncEngine) -> None:
    mine, lost, locked = [await a_job(engine, name=NAME, state=JobState.RUNNING) for _ in range(3)]
    rows = {job: await row(engine, job) for job in (mine, lost, locked)}

    async with a_locked_row(engine, locked), engine.connect() as connection:
        words = {
            transitions.Held(mine, rows[mine].token): '{"done": 1}',
            transitions.Held(lost, UUID(int=7)): '{"done": 2}',
            transitions.Held(locked, rows[locked].token): '{"done": 3}',
        }
        await asyncio.wait_for(transitions.note_progress(connection, words), 60)
        await connection.commit()

    assert [await said(engine, job) for job in (mine, lost, locked)] == [{"done": 1}, None, None]


async def test_under_repeatable_read_it_is_refused_with_advice(engine: AsyncEngine, settings: Settings) -> None:
    async def job(ctx: JobContext) -> None:
        ctx.progress(1)

    async with a_work_with(settings, job, isolation="REPEATABLE READ", max_attempts=1) as work:
        job_id = await a_job(engine, name=NAME)
        await run_job(work, job_id)

    assert "do not go together" in (await row(engine, job_id)).error


async def test_where_it_cannot_be_stored_the_job_goes_on(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any, **__: Any) -> None:
        raise OSError("away")

    async def job(ctx: JobContext) -> None:
        ctx.progress(1)
        await asyncio.sleep(0)

    monkeypatch.setattr(transitions, "note_progress", away)
    async with heard() as events, a_work_with(settings, job) as work:
        job_id = await a_job(engine, name=NAME)
        await run_job(work, job_id)
        await until(lambda: [event for event in events if getattr(event, "step", "") == "progress"], "it is told")

    assert (await row(engine, job_id)).state == "succeeded"
