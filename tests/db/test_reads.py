"""What is asked of the tables, and the names that people see."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from tests.db.conftest import statements_of
from tests.db.moves import a_held_job, retry, send
from tests.support import a_job
from worker.core.states import JobState
from worker.db import reads, turns, workers
from worker.db.ids import uuid7
from worker.db.models import Attempt, ScheduleRow
from worker.db.transitions import Held
from worker.db.turns import WALK, Position

MINUTE = timedelta(minutes=1)
SOON = timedelta(seconds=30)


async def now(engine: AsyncEngine) -> datetime:
    found: datetime = await send(engine, lambda c: c.scalar(text("SELECT clock_timestamp()")))
    return found


async def test_an_installation_has_one_id_for_ever(engine: AsyncEngine) -> None:
    assert await send(engine, reads.installation_id) == await send(engine, reads.installation_id)


@pytest.mark.leaves_running
async def test_a_standing_tells_why_a_job_was_not_claimed(engine: AsyncEngine) -> None:
    later = await a_job(engine, run_at=await now(engine) + MINUTE, crashes=2)
    running, overdue = await a_job(engine, state=JobState.RUNNING), await a_job(engine)

    found = await send(engine, lambda c: reads.standings(c, [later, running, overdue, uuid7()]))

    assert set(found) == {later, running, overdue}
    assert (found[later].state, found[later].suspect) == (JobState.QUEUED, True)
    assert timedelta(seconds=50) < found[later].wait < MINUTE
    assert (found[running].state, found[running].suspect) == (JobState.RUNNING, False)
    assert found[overdue].wait < timedelta(0)


@pytest.mark.leaves_running
async def test_something_is_due_only_if_it_waits_now_in_these_queues(engine: AsyncEngine) -> None:
    await a_job(engine, queue="a", run_at=await now(engine) + MINUTE)
    await a_job(engine, queue="a", state=JobState.RUNNING)
    await a_job(engine, queue="b")

    found = [await send(engine, lambda c, q=q: reads.something_is_due(c, q)) for q in (["a"], ["b"], ["a", "b"])]  # type: ignore[misc]  # mypy cannot infer a lambda with a default

    assert found == [False, True, True]


@pytest.mark.leaves_running
async def test_the_state_of_a_job_is_found_by_its_token(engine: AsyncEngine) -> None:
    done, running = await a_held_job(engine, state=JobState.SUCCEEDED), await a_held_job(engine)
    stale = Held(done.job_id, uuid4())

    found = await send(engine, lambda c: reads.states_under(c, [done, running, stale]))

    assert found == {done: JobState.SUCCEEDED, running: JobState.RUNNING}
    assert await send(engine, lambda c: reads.has_succeeded_with(c, done))
    assert not await send(engine, lambda c: reads.has_succeeded_with(c, running))
    assert not await send(engine, lambda c: reads.has_succeeded_with(c, Held(uuid7(), uuid4())))


@pytest.mark.leaves_running
async def test_what_runs_under_a_worker_is_told_with_its_flag(engine: AsyncEngine) -> None:
    me = uuid7()
    plain, flagged = (
        await a_held_job(engine, worker_id=me),
        await a_held_job(engine, worker_id=me, cancel_requested=True),
    )
    await a_held_job(engine)
    await a_held_job(engine, worker_id=me, state=JobState.SUCCEEDED)

    found = await send(engine, lambda c: reads.running_under(c, me))

    assert found == {plain: False, flagged: True}


@pytest.mark.leaves_running
async def test_beats_are_told_of_all_workers_and_of_ids_that_have_only_running_jobs(engine: AsyncEngine) -> None:
    alive, gone, finished = uuid7(), uuid7(), uuid7()
    await send(engine, lambda c: workers.register(c, alive, queues=["a"], concurrency=1))
    await send(engine, lambda c: workers.beat(c, alive))
    for worker_id in (alive, gone):
        await a_job(engine, state=JobState.RUNNING, worker_id=worker_id)
    await a_job(engine, state=JobState.FAILED, worker_id=finished)

    found = await send(engine, lambda c: reads.sweep(c, horizon=MINUTE, soon=MINUTE))

    assert found.beats == {alive: 1, gone: None}


@pytest.mark.leaves_running
async def test_a_sweep_without_a_look_reads_no_jobs_and_takes_it_that_some_wait(engine: AsyncEngine) -> None:
    alive = uuid7()
    await send(engine, lambda c: workers.register(c, alive, queues=["a"], concurrency=1))
    await a_job(engine, state=JobState.RUNNING, worker_id=uuid7())

    with statements_of(engine) as sent:
        found = await send(engine, lambda c: reads.sweep(c, horizon=MINUTE, soon=MINUTE, looks=False))

    assert found.beats == {alive: 0}
    assert WALK in found.due
    assert not any("exarq.job" in statement for statement in sent)


async def test_the_walk_is_due_while_something_waits_that_is_due_soon_or_it_has_not_come_to_its_end(
    engine: AsyncEngine,
) -> None:
    async def due() -> frozenset[str]:
        seen: reads.Seen = await send(engine, lambda c: reads.sweep(c, horizon=MINUTE, soon=MINUTE))
        return seen.due

    when_nothing_waits = await due()
    await a_job(engine, run_at=await now(engine) + 2 * MINUTE)
    while_all_is_for_later = await due()
    waits = await a_job(engine)
    while_something_waits = await due()
    async with engine.begin() as connection:
        turn = await turns.take(connection, "reconcile")
        assert turn is not None
        await turns.end(connection, turn, rest=timedelta(0), after=Position(await now(engine), waits))
        await connection.execute(text("DELETE FROM exarq.job"))
    half_way = await due()

    assert [when_nothing_waits, while_all_is_for_later] == [{"prune", "relay"}] * 2  # for nobody listens
    assert [while_something_waits, half_way] == [{"prune", "relay", "reconcile"}] * 2


@pytest.mark.leaves_running
async def test_waiting_jobs_come_in_pages_in_the_order_they_are_due(engine: AsyncEngine) -> None:
    start = await now(engine) - MINUTE
    second, first = await a_job(engine, run_at=start + MINUTE / 2), await a_job(engine, run_at=start)
    twins = sorted([await a_job(engine, run_at=start + MINUTE) for _ in range(2)])
    await a_job(engine, run_at=start + MINUTE * 5)
    await a_job(engine, state=JobState.RUNNING)

    async def pages(connection: AsyncConnection) -> list[list[Any]]:
        found, after = [], None
        while page := await reads.waiting(connection, after=after, horizon=SOON, limit=3):
            found.append([job.id for job in page])
            after = Position(page[-1].run_at, page[-1].id)
        return found

    assert await send(engine, pages) == [[first, second, twins[0]], [twins[1]]]


async def test_a_waiting_job_tells_how_long_it_still_waits(engine: AsyncEngine) -> None:
    job_id = await a_job(engine, run_at=await now(engine) + timedelta(seconds=20), queue="a")

    [found] = await send(engine, lambda c: reads.waiting(c, after=None, horizon=SOON, limit=3))

    assert (found.id, found.name, found.queue) == (job_id, "tests.noop", "a")
    assert 15 < found.due_in < 20


@pytest.mark.leaves_running
async def test_people_see_scheduled_and_retrying_jobs_by_name(engine: AsyncEngine) -> None:
    later = await now(engine) + MINUTE
    await a_job(engine)
    await a_job(engine, run_at=later)
    await a_job(engine, run_at=later, failures=1)
    for state in (JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        await a_job(engine, state=state)

    async with AsyncSession(engine) as session:
        counts = await reads.counts(session)
        lines = [await reads.jobs(session, state=s, name=None, queue=None, limit=9) for s in reads.SHOWN_STATES]

    assert counts == dict.fromkeys(reads.SHOWN_STATES, 1)
    assert [[line.state for line in found] for found in lines] == [[name] for name in reads.SHOWN_STATES]


async def test_a_list_of_jobs_has_the_newest_first_and_only_those_that_match(engine: AsyncEngine) -> None:
    old = await a_job(engine, id=uuid7(), name="a", queue="x")
    new = await a_job(engine, id=uuid7(), name="a", queue="y")
    await a_job(engine, name="b", queue="x")

    async with AsyncSession(engine) as session:
        named = await reads.jobs(session, state=None, name="a", queue=None, limit=9)
        both = await reads.jobs(session, state=None, name="a", queue="x", limit=9)
        limited = await reads.jobs(session, state=None, name="a", queue=None, limit=1)

    assert {line.id for line in named} == {old, new}
    assert [line.id for line in named] == sorted([old, new], reverse=True)
    assert [line.id for line in both] == [old]
    assert [line.id for line in limited] == [max(old, new)]


async def test_a_job_is_shown_with_its_attempts_oldest_first(engine: AsyncEngine) -> None:
    held = await a_held_job(engine, attempt=2)
    await send(engine, lambda c: retry(c, held))
    async with engine.begin() as connection:
        values = {"job_id": held.job_id, "token": uuid4(), "number": 1, "ending": "snoozed"}
        await connection.execute(insert(Attempt).values(**values, finished_at=datetime.now(UTC)))

    async with AsyncSession(engine) as session:
        found = await reads.job(session, held.job_id)
        missing = await reads.job(session, uuid7())

    assert found is not None
    assert found[1] == "retrying"
    assert [attempt.number for attempt in found[0].attempts] == [1, 2]
    assert missing is None


async def test_the_clock_is_due_only_while_a_tick_is_near(engine: AsyncEngine) -> None:
    async def due() -> frozenset[str]:
        seen: reads.Seen = await send(engine, lambda c: reads.sweep(c, horizon=MINUTE, soon=MINUTE))
        return seen.due

    async def a_schedule(in_: timedelta, **paused: Any) -> None:
        async with engine.begin() as connection:
            moment = await now(engine)
            values = {"name": f"in {in_}", "job": "j", "declared": False, "every": MINUTE, "since": moment}
            await connection.execute(insert(ScheduleRow).values(**values, next_at=moment + in_, **paused))

    await a_schedule(2 * MINUTE)
    await a_schedule(-MINUTE, paused_at=await now(engine))
    far = await due()
    await a_schedule(MINUTE / 2)

    assert [far, await due()] == [{"prune", "relay"}, {"prune", "relay", "schedule"}]
