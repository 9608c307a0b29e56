"""A tick has its job exactly once: whoever looks, whoever dies, and whatever a person has said meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.db.conftest import statements_of
from tests.life.jobs_for_tests import rows
from tests.support import a_job, a_work, a_worker, heard, hints, until
from worker.core.registry import Registry
from worker.core.schedule import MOST_CAUGHT_UP, Schedule
from worker.db import schedules
from worker.db.schedules import Scheduled
from worker.flow.job import JobFunction
from worker.flow.schedules import pause_schedule, remove_schedule, resume_schedule
from worker.flow.work import Work
from worker.observe.events import ScheduleNameTaken, Ticked, TickFailed
from worker.settings import Settings
from worker.testing import frozen_clock
from worker.upkeep.schedule import Ticker, take

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
EVERY_HOUR: dict[str, Any] = {"every": HOUR}


async def nightly(session: AsyncSession, word: str = "by default") -> None:
    """What is scheduled."""


def a_registry(**options: Any) -> Registry:
    registry = Registry()
    registry.register(JobFunction(nightly, name="tests.nightly", **options))
    return registry


@pytest.fixture
async def work(settings: Settings) -> AsyncIterator[Work]:
    """The parts of a worker whose code declares nothing."""
    async with a_work(settings, a_registry()) as work:
        yield work


async def added(engine: AsyncEngine, overdue: timedelta = SECOND, /, **columns: Any) -> Scheduled:
    """A schedule that somebody has added, whose next tick was due so long ago."""
    given = Schedule.of(**{**EVERY_HOUR, **columns.pop("schedule", {})})
    assert given is not None
    async with engine.begin() as connection:
        now = await connection.run_sync(schedules.since_now)
        values: dict[str, Any] = {
            "name": "s",
            "job": "tests.nightly",
            "args": {},
            "queue": None,
            "priority": None,
            "declared": False,
        }
        made = Scheduled(**{**values, **columns}, schedule=given, since=now - overdue - 5 * HOUR, next_at=now - overdue)
        assert await connection.run_sync(schedules.add, made)
    return made


async def found(engine: AsyncEngine, name: str = "s") -> Scheduled:
    async with engine.connect() as connection:
        (one,) = await connection.run_sync(schedules.find, [name])
    return one


async def due_times(engine: AsyncEngine) -> list[datetime]:
    return sorted(due for (due,) in await rows(engine, "first_due_at"))


# ── one tick ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_tick_enqueues_its_job_and_the_schedule_moves_on(
    engine: AsyncEngine, redis: ArqRedis, work: Work
) -> None:
    made = await added(engine, args={"word": "given"}, queue="books", priority=2)

    async with heard() as told:
        await Ticker(work).tick()
        await work.publisher.flush()

    (job,) = await rows(engine)
    after = await found(engine)
    assert (job.name, job.args, job.queue, job.priority) == ("tests.nightly", {"word": "given"}, "books", 2)
    assert job.first_due_at == job.run_at == made.next_at
    assert (after.next_at, after.last_at, after.last_job_id) == (made.next_at + HOUR, made.next_at, job.id)
    assert list(await hints(redis, "books", 2)) == [str(job.id)]
    assert [(one.jobs, one.skipped) for one in told if isinstance(one, Ticked)] == [(1, 0)]


async def test_nothing_ticks_before_its_time(engine: AsyncEngine, work: Work) -> None:
    await added(engine, -timedelta(seconds=30))

    wait = await Ticker(work).tick()

    assert wait is None or wait > timedelta(0)
    assert await rows(engine) == []


async def test_a_look_says_when_the_next_tick_is_due(engine: AsyncEngine, settings: Settings) -> None:
    patient = settings.worker.model_copy(update={"sweep": timedelta(seconds=20)})
    async with a_work(settings.model_copy(update={"worker": patient}), a_registry()) as work:
        at_rest = await Ticker(work).tick()
        await added(engine, -timedelta(seconds=10))
        soon = await Ticker(work).tick()

    assert at_rest is None
    assert soon is not None and timedelta(0) < soon < timedelta(seconds=11)  # noqa: PT018


async def test_an_idle_look_is_one_statement(engine: AsyncEngine, work: Work) -> None:
    ticker = Ticker(work)
    await ticker.tick()

    with statements_of(work.processor) as sent:
        await ticker.tick()

    assert len(sent) == 1


async def test_of_two_workers_that_saw_the_same_tick_one_takes_it(
    engine: AsyncEngine, settings: Settings, work: Work
) -> None:
    made = await added(engine)
    now = datetime.now(UTC)

    async with a_work(settings, a_registry()) as other:
        took = [await take(one, made, now, made.next_at + HOUR) for one in (work, other)]

    assert took == [True, False]
    assert len(await rows(engine)) == 1


async def test_who_is_in_the_middle_of_a_tick_is_not_waited_for_and_when_it_dies_another_takes_the_tick(
    engine: AsyncEngine, work: Work
) -> None:
    made = await added(engine)
    async with engine.connect() as dying:
        assert await dying.run_sync(schedules.advance, "s", due=made.next_at, next_at=made.next_at + HOUR)

        again = await Ticker(work).tick()
        nobody = await rows(engine)
        await dying.rollback()
    await Ticker(work).tick()

    assert again is not None
    assert again < timedelta(seconds=1)
    assert nobody == []
    assert await due_times(engine) == [made.next_at]


async def test_many_looks_at_once_take_each_tick_once(engine: AsyncEngine, settings: Settings) -> None:
    for number in range(20):
        await added(engine, name=f"s{number}")

    async with a_work(settings, a_registry()) as one, a_work(settings, a_registry()) as two:
        await asyncio.gather(*(Ticker(work).tick() for work in (one, two, one, two)))
        await Ticker(one).tick()

    assert len(await rows(engine)) == 20


# ── what was missed ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("catch_up", "hours_late"), [("skip", []), ("last", [0]), ("all", [3, 2, 1, 0])])
async def test_ticks_that_were_missed_get_the_jobs_that_catch_up_says(
    catch_up: str, hours_late: list[int], engine: AsyncEngine, work: Work
) -> None:
    overdue = 3 * HOUR + timedelta(minutes=10)
    made = await added(engine, overdue, schedule={"catch_up": catch_up})

    await Ticker(work).tick()

    assert await due_times(engine) == [made.next_at + (3 - hours) * HOUR for hours in hours_late]
    assert (await found(engine)).next_at == made.next_at + 4 * HOUR


async def test_all_has_a_bound(engine: AsyncEngine, work: Work) -> None:
    made = await added(engine, 2 * HOUR, schedule={"every": 1, "catch_up": "all"})

    await Ticker(work).tick()

    due = await due_times(engine)
    assert len(due) == MOST_CAUGHT_UP
    assert due[0] > made.next_at


async def test_a_tick_that_is_a_little_late_was_not_missed(engine: AsyncEngine, work: Work) -> None:
    made = await added(engine, timedelta(seconds=20), schedule={"catch_up": "skip"})

    await Ticker(work).tick()

    assert await due_times(engine) == [made.next_at]


@pytest.mark.leaves_running
async def test_with_overlap_skip_a_tick_has_no_job_while_an_earlier_one_has_not_ended(
    engine: AsyncEngine, work: Work
) -> None:
    await added(engine, schedule={"overlap": "skip"})
    await Ticker(work).tick()
    ((first,),) = await rows(engine, "id")

    async with heard() as told:
        for state in ("queued", "running", "succeeded"):
            async with engine.begin() as connection:
                await connection.execute(text(f"UPDATE exarq.job SET state = '{state}' WHERE id = '{first}'"))
                await connection.execute(text("UPDATE exarq.schedule SET next_at = clock_timestamp()"))
            await Ticker(work).tick()

    assert [(one.jobs, one.skipped) for one in told if isinstance(one, Ticked)] == [(0, 1), (0, 1), (1, 0)]
    assert len(await rows(engine)) == 2


# ── by the clocks of a place ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("zone", "cron", "night", "expected"),
    [
        ("Europe/Berlin", "30 2 * * *", datetime(2027, 3, 28, tzinfo=UTC), "2027-03-28T03:00:00+02:00"),
        ("Europe/Berlin", "30 2 * * *", datetime(2027, 10, 31, tzinfo=UTC), "2027-10-31T02:30:00+02:00"),
        ("America/New_York", "30 2 * * *", datetime(2027, 3, 14, 6, tzinfo=UTC), "2027-03-14T03:00:00-04:00"),
        ("America/New_York", "30 1 * * *", datetime(2027, 11, 7, 5, tzinfo=UTC), "2027-11-07T01:30:00-04:00"),
        ("Australia/Lord_Howe", "15 2 * * *", datetime(2027, 10, 2, 15, tzinfo=UTC), "2027-10-03T02:30:00+11:00"),
        ("Australia/Lord_Howe", "45 1 * * *", datetime(2027, 4, 3, 14, tzinfo=UTC), "2027-04-04T01:45:00+11:00"),
    ],
)
async def test_a_night_in_which_the_clocks_change_has_one_tick(
    zone: str, cron: str, night: datetime, expected: str, engine: AsyncEngine, settings: Settings
) -> None:
    with frozen_clock(night) as clock:
        async with a_work(settings, a_registry(cron=cron, timezone=zone)) as work:
            ticker = Ticker(work)
            for _ in range(4 * 6):
                await ticker.tick()
                clock.tick(timedelta(minutes=10))

    assert await due_times(engine) == [datetime.fromisoformat(expected)]


# ── what the code declares, and what a person says ──────────────────────────────────────────────────────────────────


async def test_what_the_code_declares_is_made_at_the_start_and_changed_when_it_changes(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work(settings, a_registry(cron="0 3 * * *", timezone="Europe/Berlin")) as work:
        await Ticker(work).tick()
    made = await found(engine, "tests.nightly")
    async with a_work(settings, a_registry(cron="0 3 * * *", timezone="Europe/Berlin", overlap="skip")) as work:
        await Ticker(work).tick()
    same_rhythm = await found(engine, "tests.nightly")
    async with a_work(settings, a_registry(every=60)) as work:
        await Ticker(work).tick()
    changed = await found(engine, "tests.nightly")

    assert (made.job, made.declared, made.args) == ("tests.nightly", True, {})
    assert made.schedule == Schedule("0 3 * * *", "Europe/Berlin")
    assert (same_rhythm.next_at, same_rhythm.since) == (made.next_at, made.since)
    assert same_rhythm.schedule.overlap == "skip"
    assert changed.schedule == Schedule(every=timedelta(minutes=1))
    assert changed.next_at == changed.since + timedelta(minutes=1)


async def test_a_start_does_not_undo_what_a_person_has_paused(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings, a_registry(every=HOUR)) as work:
        await Ticker(work).tick()
    async with AsyncSession(engine) as session, session.begin():
        await pause_schedule(session, "tests.nightly")
        await session.execute(text("UPDATE exarq.schedule SET next_at = clock_timestamp()"))

    for every in (HOUR, timedelta(seconds=1)):  # the same release, and one that declares it otherwise
        async with a_work(settings, a_registry(every=every)) as work:
            await Ticker(work).tick()
            await Ticker(work).tick()

    assert (await found(engine, "tests.nightly")).paused_at is not None
    assert await rows(engine) == []


async def test_a_schedule_that_was_paused_after_a_worker_saw_it_does_not_tick(engine: AsyncEngine, work: Work) -> None:
    made = await added(engine)
    async with AsyncSession(engine) as session, session.begin():
        await pause_schedule(session, "s")

    assert not await take(work, made, datetime.now(UTC), made.next_at + HOUR)
    assert await rows(engine) == []


async def test_a_schedule_goes_on_after_a_pause_with_its_next_tick(engine: AsyncEngine, work: Work) -> None:
    made = await added(engine, 2 * HOUR + timedelta(minutes=1))
    async with AsyncSession(engine) as session, session.begin():
        await pause_schedule(session, "s")
    async with AsyncSession(engine) as session, session.begin():
        resumed = await resume_schedule(session, "s")

    await Ticker(work).tick()

    assert (resumed.paused_at, resumed.next_at) == (None, made.next_at + 3 * HOUR)
    assert await rows(engine) == []


async def test_what_is_declared_no_more_ticks_only_where_it_still_is_and_stays(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with (
        a_work(settings, a_registry(every=HOUR)) as older,
        a_work(settings, a_registry()) as newer,
        a_work(settings, Registry()) as of_other_modules,
    ):
        await Ticker(older).tick()
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE exarq.schedule SET next_at = clock_timestamp()"))
        for work in (newer, of_other_modules):
            await Ticker(work).tick()
        nobody = await rows(engine)
        await Ticker(older).tick()

    assert nobody == []
    assert len(await rows(engine)) == 1
    assert (await found(engine, "tests.nightly")).declared


async def test_one_that_was_added_by_hand_keeps_its_name_and_the_code_is_told(
    engine: AsyncEngine, settings: Settings
) -> None:
    made = await added(engine, -HOUR, name="tests.nightly")

    async with a_work(settings, a_registry(every=60)) as work, heard() as told:
        await Ticker(work).tick()

    assert await found(engine, "tests.nightly") == made
    assert ScheduleNameTaken(schedule="tests.nightly") in told


async def test_a_tick_that_this_workers_code_cannot_make_stays_due_and_keeps_no_other_from_ticking(
    engine: AsyncEngine, work: Work
) -> None:
    misfit = await added(engine, 2 * SECOND, name="misfit", args={"words": 3})
    await added(engine)

    async with heard() as told:
        await Ticker(work).tick()

    (failed,) = [one for one in told if isinstance(one, TickFailed)]
    assert failed.schedule == "misfit"
    assert "words" in failed.error
    assert (await found(engine, "misfit")).next_at == misfit.next_at
    assert len(await rows(engine)) == 1


async def test_a_tick_whose_key_somebody_just_takes_keeps_no_other_from_ticking(
    engine: AsyncEngine, settings: Settings
) -> None:
    blocked = await added(engine, 2 * SECOND, name="blocked", schedule={"overlap": "skip"})
    await added(engine)
    hurried = settings.database.model_copy(update={"statement_timeout": SECOND})

    async with (
        a_work(settings.model_copy(update={"database": hurried}), a_registry()) as work,
        engine.begin() as holder,
        heard() as told,
    ):
        arguments = "'tests.nightly', key => 'schedule blocked'"
        await holder.execute(text(f"SELECT exarq.enqueue({arguments})"))
        await Ticker(work).tick()
        await holder.rollback()

    assert [one.schedule for one in told if isinstance(one, TickFailed)] == ["blocked"]
    assert (await found(engine, "blocked")).next_at == blocked.next_at
    assert len(await rows(engine)) == 1


async def test_a_page_of_ticks_that_cannot_be_made_keeps_none_behind_it_from_ticking(
    engine: AsyncEngine, work: Work
) -> None:
    for number in range(schedules.MOST_AT_ONCE):
        await added(engine, 2 * SECOND, name=f"misfit {number}", args={"words": 3})
    await added(engine)

    wait = await Ticker(work).tick()

    assert len(await rows(engine)) == 1
    assert wait is not None
    assert wait > timedelta(0)


async def test_a_page_of_ticks_that_are_not_due_yet_is_waited_for(engine: AsyncEngine, settings: Settings) -> None:
    for number in range(schedules.MOST_AT_ONCE):
        await added(engine, -timedelta(seconds=100), name=f"s{number}")
    patient = settings.worker.model_copy(update={"sweep": timedelta(seconds=60)})

    async with a_work(settings.model_copy(update={"worker": patient}), a_registry()) as work:
        wait = await Ticker(work).tick()

    assert wait is not None
    assert wait > timedelta(seconds=10)


async def test_a_removed_schedule_does_not_tick(engine: AsyncEngine, work: Work) -> None:
    await added(engine)
    async with AsyncSession(engine) as session, session.begin():
        await remove_schedule(session, "s")

    await Ticker(work).tick()

    assert await rows(engine) == []


async def test_a_worker_ticks_on_time(engine: AsyncEngine, settings: Settings) -> None:
    slow_sweep = settings.worker.model_copy(update={"sweep": timedelta(seconds=2)})
    async with a_worker(settings.model_copy(update={"worker": slow_sweep}), a_registry(every=3)):
        await until(lambda: _succeeded(engine, 2), "two ticks' jobs have run")

    late = await rows(engine, "enqueued_at - first_due_at")
    assert all(timedelta(0) <= one < timedelta(seconds=5) for (one,) in late)


async def test_a_worker_whose_next_tick_is_far_sees_one_that_is_made_elsewhere(
    engine: AsyncEngine, settings: Settings
) -> None:
    await added(engine)
    async with a_worker(settings, a_registry()):
        await until(lambda: _succeeded(engine, 1), "it has ticked, and ticks next in an hour")

        await added(engine, name="made elsewhere")

        await until(lambda: _succeeded(engine, 2), "the other has ticked")


async def _succeeded(engine: AsyncEngine, count: int) -> bool:
    return len([one for one in await rows(engine) if one.state == "succeeded"]) >= count


async def test_jobs_of_others_are_left_alone(engine: AsyncEngine, work: Work) -> None:
    job = await a_job(engine)

    await Ticker(work).tick()

    assert [one.id for one in await rows(engine)] == [job]
