"""A message ends a run at once, if PostgreSQL says so too; these workers beat so seldom that nothing else can."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.broker.listeners import listeners
from tests.broker.test_messages import GARBAGE
from tests.cancelling import (
    Sessions,
    advisory_locks,
    are,
    ask,
    beating_seldom,
    failures,
    flag,
    holds,
    idle_in_transaction,
    running_statements,
    waiting,
    want_again,
)
from tests.flow.helpers import NAME, claimed, note, notes, registry_of, start
from tests.support import a_job, a_work, a_worker, heard, row, state, until
from worker.broker import messages
from worker.broker.keys import workers_channel
from worker.broker.messages import CancelAsked, tell
from worker.db import reads
from worker.flow.availability import Availability
from worker.observe.events import RunCancelled, StepFailed
from worker.settings import Settings
from worker.upkeep.listen import listen

pytestmark = pytest.mark.usefixtures("note_table")


# ── what a message ends ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_statement_ends_on_the_server_and_leaves_nothing_behind(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, seldom: Settings, installation: UUID
) -> None:
    async def sleeping(session: AsyncSession, seconds: float = 60) -> None:
        await note(session, f"{uuid4()}")
        await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})

    async with a_worker(seldom, registry_of(sleeping)):
        await until(lambda: listeners(redis, installation), "the worker listens")
        job = await a_job(engine, name=NAME)
        await until(lambda: running_statements(engine, "pg_sleep"), "it sleeps")

        assert await ask(sessions, job) == "requested"

        await until(lambda: are(engine, "cancelled", job), "the run ends")
        await until(lambda: holds(running_statements(engine, "pg_sleep"), lambda n: n == 0), "the statement is gone")
        assert await idle_in_transaction(engine) == 0
        after = [await a_job(engine, name=NAME, args={"seconds": 0}) for _ in range(4)]  # more than there are slots
        await until(lambda: are(engine, "succeeded", *after), "its slot is used again")

    found = await row(engine, job)
    assert (found.failures, found.crashes, found.error) == (0, 0, "somebody asked to cancel the job")
    assert len(await notes(engine)) == 4


async def test_a_run_that_ends_between_statements_gives_its_connection_back_clean(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, seldom: Settings, installation: UUID
) -> None:
    pids: list[int] = []

    async def locking(session: AsyncSession, seconds: float = 60) -> None:
        pids.append((await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())
        await session.execute(text("SELECT pg_advisory_lock(7)"))
        await asyncio.sleep(seconds)

    async with a_worker(seldom, registry_of(locking)):
        await until(lambda: listeners(redis, installation), "the worker listens")
        job = await a_job(engine, name=NAME)
        await until(lambda: advisory_locks(engine, 7), "it holds its lock")

        await ask(sessions, job)

        await until(lambda: are(engine, "cancelled", job), "the run ends")
        assert await advisory_locks(engine, 7) == 0
        after = await a_job(engine, name=NAME, args={"seconds": 0})
        await until(lambda: are(engine, "succeeded", after), "the next job runs")

    assert pids == [pids[0]] * 2


async def test_one_message_ends_all_runs_that_somebody_asked_to_cancel_and_no_other(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, settings: Settings, installation: UUID
) -> None:
    gate = asyncio.Event()
    async with a_worker(beating_seldom(settings, concurrency=4), waiting(gate)):
        await until(lambda: listeners(redis, installation), "the worker listens")
        flagged = [await a_job(engine, name=NAME) for _ in range(3)]
        other = await a_job(engine, name=NAME, args={"gated": True})
        await until(lambda: are(engine, "running", *flagged, other), "all run")

        for job in flagged[1:]:
            await flag(engine, job)
        await ask(sessions, flagged[0])

        await until(lambda: are(engine, "cancelled", *flagged), "the runs end")
        gate.set()
        await until(lambda: are(engine, "succeeded", other), "the other goes on to its end")

    assert await notes(engine) == [f"{other} 1"]


async def test_each_of_two_workers_ends_its_own(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, seldom: Settings, installation: UUID
) -> None:
    async with a_worker(seldom, waiting()), a_worker(seldom, waiting()):
        await until(lambda: holds(listeners(redis, installation), lambda n: n == 2), "both listen")
        jobs = [await a_job(engine, name=NAME) for _ in range(4)]  # as many as both have slots
        await until(lambda: are(engine, "running", *jobs), "all run")

        for job in jobs:
            await ask(sessions, job)

        await until(lambda: are(engine, "cancelled", *jobs), "the runs end")

    assert await notes(engine) == []


async def test_a_message_that_comes_before_the_function_is_called_ends_it_all_the_same(
    engine: AsyncEngine,
    sessions: Sessions,
    redis: ArqRedis,
    settings: Settings,
    installation: UUID,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    running_under = reads.running_under

    async def counted(*args: Any) -> Any:
        nonlocal looks
        found = await running_under(*args)
        looks += 1
        return found

    async with a_work(settings, waiting()) as work, heard() as events:
        monkeypatch.setattr(reads, "running_under", counted)
        listening = asyncio.create_task(listen(work, redis, Availability(redis)))
        await until(lambda: listeners(redis, installation), "the worker listens")
        job = await a_job(engine, name=NAME)
        (run,) = await claimed(work, job)

        await ask(sessions, job)
        await until(lambda: looks >= 2, "it has looked in vain")
        await start(work, run)

        listening.cancel()
        await asyncio.wait([listening])

    assert await state(engine, job) == "cancelled"
    assert [event.job for event in events if isinstance(event, RunCancelled)] == [job]


# ── a message is a hint ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_postgresql_does_not_say_ends_nothing_however_often_it_is_told(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, seldom: Settings, installation: UUID
) -> None:
    gate = asyncio.Event()
    async with heard() as events, a_worker(seldom, waiting(gate)):
        await until(lambda: listeners(redis, installation), "the worker listens")
        other, wanted = await a_job(engine, name=NAME, args={"gated": True}), await a_job(engine, name=NAME)
        await until(lambda: are(engine, "running", other, wanted), "both run")
        worker_id = (await row(engine, other)).worker_id

        for data in GARBAGE:
            await redis.publish(workers_channel(installation), data)
        await tell(redis, [CancelAsked(job, worker_id, installation) for job in (other, wanted, uuid4())] * 5)
        await tell(redis, [CancelAsked(other, uuid4(), installation)])
        await ask(sessions, wanted)

        await until(lambda: are(engine, "cancelled", wanted), "the true one behind the lies is heard")
        gate.set()
        await until(lambda: are(engine, "succeeded", other), "the other goes on to its end")

    assert [event.job for event in events if isinstance(event, RunCancelled)] == [wanted]
    assert not [event for event in events if isinstance(event, StepFailed)]


async def test_a_message_for_an_attempt_that_has_ended_does_not_end_the_next(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, seldom: Settings, installation: UUID
) -> None:
    gate = asyncio.Event()
    async with a_worker(seldom, waiting(gate)):
        await until(lambda: listeners(redis, installation), "the worker listens")
        job, mark = await a_job(engine, name=NAME, args={"gated": True}), await a_job(engine, name=NAME)
        await until(lambda: are(engine, "running", job, mark), "both run")
        worker_id = (await row(engine, job)).worker_id
        await ask(sessions, job)
        await until(lambda: are(engine, "cancelled", job), "the first attempt ends")

        await want_again(engine, job)
        await until(lambda: are(engine, "running", job), "the second attempt runs")
        await tell(redis, [CancelAsked(job, worker_id, installation)])
        await ask(sessions, mark)

        await until(lambda: are(engine, "cancelled", mark), "the late message was heard")
        gate.set()
        await until(lambda: are(engine, "succeeded", job), "the second attempt goes on to its end")

    assert await notes(engine) == [f"{job} 2"]


# ── the listening itself ────────────────────────────────────────────────────────────────────────────────────────────


async def test_while_postgresql_does_not_answer_the_worker_listens_on(
    engine: AsyncEngine,
    sessions: Sessions,
    redis: ArqRedis,
    seldom: Settings,
    installation: UUID,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(*_args: object) -> Any:
        raise OSError("PostgreSQL is away")

    async with heard() as events, a_worker(seldom, waiting()):
        await until(lambda: listeners(redis, installation), "the worker listens")
        first, second = await a_job(engine, name=NAME), await a_job(engine, name=NAME)
        await until(lambda: are(engine, "running", first, second), "both run")

        with monkeypatch.context() as patch:
            patch.setattr(reads, "running_under", fail)
            await ask(sessions, first)
            await until(lambda: failures(events), "the look failed")
        await ask(sessions, second)

        await until(lambda: are(engine, "cancelled", first, second), "the next message ends both")

    assert failures(events) == ["OSError: PostgreSQL is away"]


async def test_a_stopped_worker_listens_no_longer(
    redis: ArqRedis, seldom: Settings, installation: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_QUIET", timedelta(seconds=1000))
    monkeypatch.setattr("worker.alive._AFTER_STOP", timedelta(seconds=1000))  # after which it cancels by force

    async with a_worker(seldom, waiting()):
        await until(lambda: listeners(redis, installation), "the worker listens")

    await until(lambda: holds(listeners(redis, installation), lambda n: n == 0), "it listens no longer")
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "exarq listen"]
