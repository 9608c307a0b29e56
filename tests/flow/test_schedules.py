"""Schedules that people and programs make and change, in their own transaction."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from arq.connections import ArqRedis
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from tests.life.jobs_for_tests import note, rows
from tests.support import hints
from worker.core.errors import ArgumentsInvalid, ScheduleRefused, UnknownJob, UnknownSchedule
from worker.core.registry import default_registry
from worker.core.schedule import Schedule
from worker.flow.job import JobFunction, job
from worker.flow.publish import Publisher
from worker.flow.schedules import (
    add_schedule,
    list_schedules,
    pause_schedule,
    remove_schedule,
    resume_schedule,
    run_schedule,
)
from worker.testing import frozen_clock

Sessions = async_sessionmaker[AsyncSession]
WORD = {"word": "x"}


@pytest.fixture
def declared() -> Iterator[JobFunction[Any, ..., Any]]:
    """A job of this process that declares a schedule."""

    @job(name="tests.declared", every=3600)
    async def scheduled(session: AsyncSession) -> None: ...

    yield scheduled
    del default_registry._definitions["tests.declared"]


async def test_a_schedule_is_there_if_and_only_if_its_transaction_committed(sessions: Sessions) -> None:
    async with sessions() as session:
        await add_schedule(session, note, WORD, cron="0 3 * * *", name="rolled back")
        await session.rollback()
    async with sessions.begin() as session:
        made = await add_schedule(
            session, "tests.note", WORD, name="kept", cron="0  3 * * *", timezone="Europe/Berlin", catch_up="all",
            overlap="skip", queue="books", priority=1,
        )  # fmt: skip

    async with sessions() as session:
        assert await list_schedules(session) == [made]
    assert made.schedule == Schedule("0 3 * * *", "Europe/Berlin", None, "all", "skip")
    assert (made.job, made.args, made.queue, made.priority, made.declared) == ("tests.note", WORD, "books", 1, False)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"job": "tests.nott", "every": 60}, UnknownJob, "no job named 'tests.nott'; did you mean 'tests.note'"),
        ({"every": 60, "args": {}}, ArgumentsInvalid, "word"),
        ({}, ArgumentsInvalid, "say when: by cron"),
        ({"cron": "0 3 * *"}, ArgumentsInvalid, "is no cron expression; it has five fields"),
        ({"cron": "0 3 * * *", "timezone": "Europe/Berln"}, ArgumentsInvalid, "did you mean 'Europe/Berlin'"),
        ({"every": 60, "queue": "arq:queue"}, ArgumentsInvalid, "no queue's name begins with arq:"),
        ({"every": 60, "priority": 10}, ArgumentsInvalid, "priority"),
        ({"every": 60, "name": ""}, ArgumentsInvalid, "a schedule's name is"),
        ({"every": 60, "name": "taken"}, ScheduleRefused, "there is a schedule named 'taken'"),
    ],
)
async def test_what_cannot_be_scheduled_is_refused_in_one_line(
    given: dict[str, Any], error: type[Exception], said: str, sessions: Sessions
) -> None:
    async with sessions.begin() as session:
        await add_schedule(session, note, WORD, name="taken", every=60)

        with pytest.raises(error, match=said) as refused:
            await add_schedule(session, **{"job": "tests.note", "args": WORD, **given})

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [pause_schedule, resume_schedule, run_schedule, remove_schedule])
async def test_a_name_that_no_schedule_has_is_told_with_the_nearest(change: Any, sessions: Sessions) -> None:
    async with sessions.begin() as session:
        await add_schedule(session, note, WORD, name="nightly", every=60)

        with pytest.raises(UnknownSchedule, match="no schedule named 'nightli'; did you mean 'nightly'"):
            await change(session, "nightli")


async def test_a_schedule_is_paused_resumed_and_removed(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        made = await add_schedule(session, note, WORD, every=3600)
        paused = await pause_schedule(session, made.name)
        again = await pause_schedule(session, made.name)
        resumed = await resume_schedule(session, made.name)
        unchanged = await resume_schedule(session, made.name)
        await remove_schedule(session, made.name)

        assert await list_schedules(session) == []
    assert paused.paused_at is not None
    assert again == paused
    assert resumed == unchanged == made


async def test_a_tick_that_has_had_its_job_does_not_come_again_after_a_pause(sessions: Sessions) -> None:
    with frozen_clock() as clock:
        async with sessions.begin() as session:
            made = await add_schedule(session, note, WORD, every=1.5)
        clock.move_to(made.next_at + timedelta(milliseconds=100))
        async with sessions.begin() as session:
            await pause_schedule(session, made.name)
            resumed = await resume_schedule(session, made.name)

    assert resumed.next_at == made.next_at + timedelta(seconds=1.5)


async def test_a_job_that_is_run_by_hand_is_due_at_once_and_the_ticks_stay(
    sessions: Sessions, publisher: Publisher, engine: AsyncEngine, redis: ArqRedis
) -> None:
    async with sessions.begin() as session:
        made = await add_schedule(session, note, WORD, every=3600, queue="books", priority=0)
    async with sessions.begin() as session:
        await pause_schedule(session, made.name)
        handle = await run_schedule(session, made.name)
    await publisher.flush()

    (found,) = await rows(engine)
    assert (found.id, found.name, found.args, found.queue) == (handle.id, "tests.note", WORD, "books")
    assert list(await hints(redis, "books", 0)) == [str(found.id)]
    async with sessions() as session:
        (after,) = await list_schedules(session)
    assert (after.next_at, after.last_job_id) == (made.next_at, None)


async def test_with_overlap_skip_a_run_by_hand_finds_the_job_that_has_not_ended(
    sessions: Sessions, engine: AsyncEngine
) -> None:
    async with sessions.begin() as session:
        await add_schedule(session, note, WORD, every=3600, overlap="skip")
        handles = [await run_schedule(session, "tests.note") for _ in range(2)]

    assert [handle.happened for handle in handles] == ["created", "exists"]
    assert len(await rows(engine)) == 1


async def test_what_the_code_declares_is_not_removed_but_by_the_code(
    sessions: Sessions, engine: AsyncEngine, declared: JobFunction[Any, ..., Any]
) -> None:
    async with engine.begin() as connection:
        columns = "name, job, declared, every, since, next_at"
        for name in ("tests.declared", "tests.former"):
            values = f"'{name}', '{name}', true, interval '1 h', now(), now()"
            await connection.execute(text(f"INSERT INTO exarq.schedule ({columns}) VALUES ({values})"))

    async with sessions.begin() as session:
        with pytest.raises(ScheduleRefused, match=r"@job declares the schedule 'tests\.declared'.*pause it"):
            await remove_schedule(session, "tests.declared")
        await remove_schedule(session, "tests.former")

        assert [one.name for one in await list_schedules(session)] == ["tests.declared"]


def test_a_sync_session_does_all_of_it_without_awaiting(database_url: str, redis: ArqRedis, redis_url: str) -> None:
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    with Session(engine) as session:
        made = add_schedule(session, note, WORD, every=timedelta(minutes=5))
        assert pause_schedule(session, made.name).paused_at is not None
        assert resume_schedule(session, made.name).paused_at is None
        assert list_schedules(session) == [made]
        assert remove_schedule(session, made.name) == made
        session.commit()
    engine.dispose()
