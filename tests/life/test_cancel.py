"""Somebody cancels a job, whatever it is doing: it ends once, and nothing is left that its state does not say."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from typing import Any
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.broker.listeners import listeners
from tests.cancelling import (
    are,
    ask,
    beating_seldom,
    execute,
    installation_of,
    running_statements,
    waiting,
    waiting_statements,
)
from tests.flow.helpers import NAME, note, notes, registry_of
from tests.support import a_job, a_worker, attempts, heard, hints, payload_ids, row, state, until
from worker.core.context import JobContext
from worker.core.outcome import Fail, Retry, Snooze
from worker.core.registry import Registry
from worker.flow.job import JobFunction
from worker.observe.events import RunCancelled
from worker.process import Worker
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture(autouse=True)
async def _note_table(engine: AsyncEngine) -> None:
    await execute(engine, "CREATE TABLE note (word text UNIQUE)")


async def test_a_cancelled_job_that_waited_never_runs(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, redis: ArqRedis
) -> None:
    ran: list[UUID] = []

    async def job(ctx: JobContext) -> None:
        ran.append(ctx.job_id)

    function = JobFunction(job, name=NAME)
    registry = Registry()
    registry.register(function)
    async with sessions.begin() as session:
        due = (await function.enqueue(session)).id
        soon = (await function.options(delay=0.3).enqueue(session)).id
        other = (await function.options(delay=0.6).enqueue(session)).id
    outcomes = [await ask(sessions, job) for job in (due, soon)]
    async with a_worker(settings, registry):
        await until(lambda: are(engine, "succeeded", other), "what is due after them has run")
        await until(lambda: _is_empty(redis), "their hints have left Redis")

    assert outcomes == ["cancelled", "cancelled"]
    assert ran == [other]
    assert await are(engine, "cancelled", due, soon)


async def test_a_request_that_races_with_the_success_ends_as_exactly_one_of_both(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    dice = random.Random(11)
    written: defaultdict[UUID, asyncio.Event] = defaultdict(asyncio.Event)

    async def job(ctx: JobContext, seconds: float) -> None:
        await note(ctx.session, str(ctx.job_id))
        written[ctx.job_id].set()
        await asyncio.sleep(seconds)

    function = JobFunction(job, name=NAME)
    registry = Registry()
    registry.register(function)
    outcomes: dict[UUID, str] = {}

    async def race(job: UUID) -> None:
        await written[job].wait()
        await asyncio.sleep(dice.random() * 0.05)
        outcomes[job] = await ask(sessions, job)

    async with a_worker(settings, registry):
        async with sessions.begin() as session:
            ids = [(await function.enqueue(session, dice.random() * 0.1)).id for _ in range(100)]
        await asyncio.gather(*(race(job) for job in ids))
        await until(lambda: _all_final(engine), "all have ended")

    states = {job: await state(engine, job) for job in ids}
    assert set(states.values()) <= {"succeeded", "cancelled"}
    assert await notes(engine) == sorted(str(job) for job, ended in states.items() if ended == "succeeded")
    assert {states[job] for job, outcome in outcomes.items() if outcome == "final"} <= {"succeeded"}


# ── what a function makes of its cancellation ───────────────────────────────────────────────────────────────────────


def _stubborn(then: Any) -> Registry:
    """A job that writes, waits, and does as it likes when it is cancelled."""

    async def job(session: AsyncSession) -> str:
        await note(session, "written")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if isinstance(then, Exception):
                raise then from None
        return "went on"

    return registry_of(job, max_attempts=3)


@pytest.mark.parametrize(
    ("then", "stands"),
    [
        ("return", ("succeeded", 0, None, [])),
        (ValueError("no"), ("cancelled", 1, "ValueError: no", ["retried"])),
        (Retry(delay=0), ("cancelled", 1, "worker.core.outcome.Retry: ", ["retried"])),
        (Snooze(0), ("cancelled", 0, None, ["snoozed"])),
        (Fail("hopeless"), ("failed", 1, "worker.core.outcome.Fail: hopeless", ["failed"])),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value)[:10],
)
async def test_what_a_function_does_instead_counts_but_it_does_not_run_again(
    engine: AsyncEngine,
    sessions: Sessions,
    settings: Settings,
    redis: ArqRedis,
    then: Any,
    stands: tuple[str, int, str | None, list[str]],
) -> None:
    ended, failures, error, endings = stands
    async with a_worker(beating_seldom(settings), _stubborn(then)):
        installation = await installation_of(engine)
        await until(lambda: listeners(redis, installation), "the worker listens")
        job = await a_job(engine, name=NAME)
        await until(lambda: _has_written(engine), "the function waits")

        assert await ask(sessions, job) == "requested"

        await until(lambda: are(engine, ended, job), f"it is {ended}")

    found = await row(engine, job)
    assert (found.attempt, found.failures) == (1, failures)
    assert found.error == error if error is None else found.error.startswith(error)
    assert found.finished_at is not None
    assert [attempt.ending for attempt in await attempts(engine, job)] == endings
    assert await notes(engine) == (["written"] if ended == "succeeded" else [])


async def test_a_function_that_goes_on_after_its_statement_was_cancelled_cannot_succeed(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, redis: ArqRedis
) -> None:
    async def job(session: AsyncSession) -> str:
        await note(session, "written")
        try:
            await session.execute(text("SELECT pg_sleep(60)"))
        except asyncio.CancelledError:
            return "went on"
        raise AssertionError

    async with a_worker(beating_seldom(settings), registry_of(job)):
        installation = await installation_of(engine)
        await until(lambda: listeners(redis, installation), "the worker listens")
        cancelled = await a_job(engine, name=NAME)
        await until(lambda: running_statements(engine, "pg_sleep"), "it sleeps")

        await ask(sessions, cancelled)

        await until(lambda: are(engine, "cancelled", cancelled), "it is cancelled")
    assert await notes(engine) == []


async def test_a_function_that_has_returned_is_nobodys_to_end(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    async def deferring(ctx: JobContext) -> str:
        await ctx.session.execute(text("INSERT INTO slow VALUES (1)"))
        return "done"

    await _make_commit_wait(engine)
    async with heard() as events, a_worker(settings, registry_of(deferring)), engine.connect() as gate:
        await gate.execute(text("SELECT pg_advisory_xact_lock(8)"))
        job = await a_job(engine, name=NAME)
        await until(lambda: waiting_statements(engine, "COMMIT"), "the success is being committed")

        asking = asyncio.create_task(ask(sessions, job))
        await until(lambda: waiting_statements(engine, "FOR NO KEY UPDATE"), "the request waits for it")
        await gate.rollback()

        assert await asking == "final"
    assert (await row(engine, job)).result == "done"
    assert not [event for event in events if isinstance(event, RunCancelled)]


async def test_a_worker_that_stops_gives_a_job_that_is_no_longer_wanted_to_nobody(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(*_args: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("worker.alive.listen", deaf)
    short = beating_seldom(settings)
    short = short.model_copy(update={"worker": short.worker.model_copy(update={"grace": settings.worker.beat})})
    worker = Worker(short, registry=waiting(), handle_signals=False)
    task = asyncio.create_task(worker.main())
    job = await a_job(engine, name=NAME)
    await until(lambda: are(engine, "running", job), "it runs")

    await ask(sessions, job)
    worker.stop()
    await task
    await worker.close()

    assert await state(engine, job) == "cancelled"
    assert len(await attempts(engine, job)) == 1
    assert await notes(engine) == []


async def _make_commit_wait(engine: AsyncEngine) -> None:
    """A table for which each COMMIT waits until nobody holds the lock 8."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE slow (id int)"))
        await connection.execute(
            text(
                "CREATE FUNCTION wait_for_8() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM pg_advisory_xact_lock(8); RETURN NULL; END $$"
            )
        )
        await connection.execute(
            text(
                "CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED"
                " FOR EACH ROW EXECUTE FUNCTION wait_for_8()"
            )
        )


async def _is_empty(redis: ArqRedis) -> bool:
    return not await hints(redis) and not await payload_ids(redis)


async def _has_written(engine: AsyncEngine) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    async with engine.connect() as connection:
        return bool((await connection.execute(text(f"{query} AND query LIKE '%INTO note%'"))).scalar_one())


async def _all_final(engine: AsyncEngine) -> bool:
    async with engine.connect() as connection:
        query = "SELECT count(*) FROM exarq.job WHERE state IN ('queued', 'running')"
        return not (await connection.execute(text(query))).scalar_one()
