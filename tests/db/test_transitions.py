"""The moves of a running job: each guarded by token and state, each leaving what it promises."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.db.moves import (
    ERROR,
    LEAVING,
    MINUTE,
    VERBS,
    Verb,
    a_held_job,
    release,
    release_many,
    retry,
    send,
    snooze,
    succeed,
    unless_locked,
)
from tests.support import attempts, row
from worker.core.remarks import Remarks
from worker.core.states import FINAL, JobState
from worker.db import transitions
from worker.db.ids import uuid7
from worker.db.transitions import Held

pytestmark = pytest.mark.leaves_running

OTHERS = [state for state in JobState if state is not JobState.RUNNING]


def named(verb: Any) -> str:
    return str(getattr(verb, "__name__", verb))


# ── the guards ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", VERBS, ids=named)
async def test_a_stale_token_changes_nothing(engine: AsyncEngine, verb: Verb) -> None:
    held = await a_held_job(engine)
    before = await row(engine, held.job_id)

    answer = await send(engine, lambda connection: verb(connection, Held(held.job_id, uuid4())))

    assert not answer
    assert await row(engine, held.job_id) == before
    assert await attempts(engine, held.job_id) == []


@pytest.mark.parametrize("state", OTHERS)
@pytest.mark.parametrize("verb", VERBS, ids=named)
async def test_a_job_that_does_not_run_is_not_moved(engine: AsyncEngine, verb: Verb, state: JobState) -> None:
    held = await a_held_job(engine, state=state)
    before = await row(engine, held.job_id)

    answer = await send(engine, lambda connection: verb(connection, held))

    assert not answer
    assert await row(engine, held.job_id) == before
    assert await attempts(engine, held.job_id) == []


@pytest.mark.parametrize("verb", VERBS, ids=named)
async def test_a_job_moves_once(engine: AsyncEngine, verb: Verb) -> None:
    held = await a_held_job(engine)

    first = await send(engine, lambda connection: verb(connection, held))
    after_the_first = await row(engine, held.job_id)
    second = await send(engine, lambda connection: verb(connection, held))

    assert first
    assert not second
    assert await row(engine, held.job_id) == after_the_first


@pytest.mark.parametrize("verb", VERBS, ids=named)
async def test_only_the_first_of_two_moves_at_once_finds_the_job_held(engine: AsyncEngine, verb: Verb) -> None:
    held = await a_held_job(engine)

    sent = [send(engine, lambda connection: verb(connection, held)) for _ in range(4)]
    answers = await asyncio.gather(*map(unless_locked, sent))

    assert sum(bool(answer) for answer in answers) == 1
    assert len(await attempts(engine, held.job_id)) == (verb in LEAVING)


# ── succeed ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_success_keeps_its_result_and_forgets_an_earlier_error(engine: AsyncEngine) -> None:
    held = await a_held_job(engine, error="the last attempt's")

    await send(engine, lambda connection: succeed(connection, held))

    job = await row(engine, held.job_id)
    assert (job.state, job.result, job.error) == (JobState.SUCCEEDED, {"a": 1}, None)
    assert job.started_at < job.finished_at
    assert job.token == held.token
    assert await attempts(engine, held.job_id) == []


async def test_a_success_limits_the_silence_of_its_own_transaction_only(engine: AsyncEngine) -> None:
    held = await a_held_job(engine)
    limit = text("SELECT current_setting('idle_in_transaction_session_timeout')")

    async with engine.connect() as connection:
        async with connection.begin():
            await succeed(connection, held)
            inside = (await connection.execute(limit)).scalar()
        after = (await connection.execute(limit)).scalar()

    assert (inside, after) == ("5s", "0")


async def test_a_success_is_rolled_back_with_its_transaction(engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    async with engine.connect() as connection:
        await succeed(connection, held)
        await connection.rollback()

    assert (await row(engine, held.job_id)).state == JobState.RUNNING


async def test_many_succeed_in_one_statement_except_those_that_are_not_held(engine: AsyncEngine) -> None:
    held = [await a_held_job(engine) for _ in range(5)]
    stale, final = Held(held[0].job_id, uuid4()), await a_held_job(engine, state=JobState.FAILED)
    results = {one: str(number) for number, one in enumerate([stale, *held[1:], final])}

    done = await send(engine, lambda connection: transitions.succeed_many(connection, results))

    assert done == set(held[1:])
    assert [(await row(engine, one.job_id)).result for one in held] == [None, 1, 2, 3, 4]
    assert (await row(engine, final.job_id)).state == JobState.FAILED


async def test_flushes_of_the_same_jobs_in_opposite_order_do_not_deadlock(engine: AsyncEngine) -> None:
    held = [await a_held_job(engine) for _ in range(200)]
    forth, back = dict.fromkeys(held, "1"), dict.fromkeys(reversed(held), "2")

    async def flush(results: dict[Held, str]) -> set[Held]:
        async with engine.begin() as connection:
            return await transitions.succeed_many(connection, results)

    done = await asyncio.gather(*[flush(results) for results in (forth, back) * 2])

    assert sorted(one.job_id for stored in done for one in stored) == sorted(one.job_id for one in held)


# ── leave ───────────────────────────────────────────────────────────────────────────────────────────────────────────

WHERE_TO = {
    "retry": (JobState.QUEUED, "retried", 1, "ValueError: no such word", "Traceback: line 1"),
    "fail": (JobState.FAILED, "failed", 1, "ValueError: no such word", "Traceback: line 1"),
    "cancel": (JobState.CANCELLED, "cancelled", 0, "not wanted", None),
    "snooze": (JobState.QUEUED, "snoozed", 0, None, None),
    "release": (JobState.QUEUED, "released", 0, "stopped", None),
    "release_many": (JobState.QUEUED, "released", 0, "stopped", None),
}


@pytest.mark.parametrize("verb", LEAVING, ids=named)
async def test_a_job_that_leaves_goes_where_its_verb_says(engine: AsyncEngine, verb: Verb) -> None:
    to, ending, failures, error, _ = WHERE_TO[named(verb)]
    held = await a_held_job(engine, attempt=4, crashes=1, failures=2)

    answer = await send(engine, lambda connection: verb(connection, held))

    moved = answer[0] if isinstance(answer, list) else answer
    job = await row(engine, held.job_id)
    assert (job.state, job.error, job.failures) == (to, error, 2 + failures)
    assert (job.attempt, job.crashes) == (4, 1)
    assert (job.finished_at is not None) == (to in FINAL)
    assert (moved.job_id, moved.name, moved.queue) == (held.job_id, "tests.noop", "default")
    assert (moved.state, moved.ending, moved.enqueued_at) == (to, ending, job.enqueued_at)


@pytest.mark.parametrize("verb", LEAVING, ids=named)
async def test_a_job_that_leaves_notes_its_attempt(engine: AsyncEngine, verb: Verb) -> None:
    _, ending, _, error, traceback = WHERE_TO[named(verb)]
    held = await a_held_job(engine, attempt=4, worker_id=uuid7())
    job = await row(engine, held.job_id)

    await send(engine, lambda connection: verb(connection, held))

    [noted] = await attempts(engine, held.job_id)
    assert (noted.token, noted.number, noted.worker_id) == (held.token, 4, job.worker_id)
    assert (noted.ending, noted.error, noted.traceback) == (ending, error, traceback)
    assert noted.started_at == job.started_at < noted.finished_at


@pytest.mark.parametrize("verb", [retry, snooze, release], ids=named)
async def test_a_wait_is_counted_from_now_also_in_a_long_transaction(engine: AsyncEngine, verb: Verb) -> None:
    held = await a_held_job(engine)

    clock = text("SELECT clock_timestamp()")

    async with engine.begin() as connection:
        await connection.execute(text("SELECT pg_sleep(0.3)"))
        before = (await connection.execute(clock)).scalar_one()
        moved = await verb(connection, held)
        after = (await connection.execute(clock)).scalar_one()

    run_at = (await row(engine, held.job_id)).run_at
    assert before + MINUTE <= run_at <= after + MINUTE
    assert MINUTE - (after - before) <= moved.wait <= MINUTE


async def test_a_retry_after_contention_counts_as_no_failure(engine: AsyncEngine) -> None:
    held = await a_held_job(engine, failures=2)

    await send(engine, lambda connection: transitions.retry(connection, held, ERROR, wait=timedelta(0), counts=False))

    assert (await row(engine, held.job_id)).failures == 2


async def test_a_snooze_keeps_the_error_of_an_earlier_attempt(engine: AsyncEngine) -> None:
    held = await a_held_job(engine, error="the last attempt's")

    await send(engine, lambda connection: snooze(connection, held))

    assert (await row(engine, held.job_id)).error == "the last attempt's"


@pytest.mark.parametrize("verb", [retry, snooze, release, release_many], ids=named)
async def test_a_flagged_job_is_cancelled_instead_of_queued(engine: AsyncEngine, verb: Verb) -> None:
    held = await a_held_job(engine, cancel_requested=True)

    answer = await send(engine, lambda connection: verb(connection, held))

    moved = answer[0] if isinstance(answer, list) else answer
    job = await row(engine, held.job_id)
    assert moved.state == job.state == JobState.CANCELLED
    assert job.finished_at is not None
    assert [one.ending for one in await attempts(engine, held.job_id)] == [moved.ending]


async def test_a_flagged_job_that_succeeds_has_succeeded(engine: AsyncEngine) -> None:
    held = await a_held_job(engine, cancel_requested=True)

    await send(engine, lambda connection: succeed(connection, held))

    assert (await row(engine, held.job_id)).state == JobState.SUCCEEDED


async def test_many_are_released_except_those_that_are_not_held(engine: AsyncEngine) -> None:
    mine, flagged = await a_held_job(engine), await a_held_job(engine, cancel_requested=True)
    other = await a_held_job(engine)
    given = [Held(other.job_id, uuid4()), flagged, mine]

    moved = await send(engine, lambda connection: transitions.release_many(connection, given, "stopped"))

    assert {job.job_id: job.state for job in moved} == {
        mine.job_id: JobState.QUEUED,
        flagged.job_id: JobState.CANCELLED,
    }
    assert (await row(engine, other.job_id)).state == JobState.RUNNING
    assert (await row(engine, mine.job_id)).run_at <= datetime.now(UTC) + timedelta(seconds=1)


# ── remarks ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SLOW = Remarks(blocked=timedelta(seconds=2), lazy_loads={"Order.lines": 70})
QUICK = Remarks(blocked=timedelta(seconds=0.5), lazy_loads={"Order.lines": 3})


async def test_a_success_with_something_to_tell_leaves_an_attempt(engine: AsyncEngine) -> None:
    held = await a_held_job(engine, attempt=3, worker_id=uuid7())

    assert await send(engine, lambda connection: connection.run_sync(transitions.succeed, held, '"done"', SLOW))

    [told], job = await attempts(engine, held.job_id), await row(engine, held.job_id)
    assert (job.state, job.result) == (JobState.SUCCEEDED, "done")
    assert (told.ending, told.blocked, told.lazy_loads) == ("succeeded", SLOW.blocked, SLOW.lazy_loads)
    assert (told.token, told.number, told.worker_id) == (held.token, 3, job.worker_id)
    assert (told.started_at, told.finished_at) == (job.started_at, job.finished_at)


async def test_a_success_with_little_to_tell_leaves_none(engine: AsyncEngine) -> None:
    one, many = await a_held_job(engine), await a_held_job(engine)

    await send(engine, lambda connection: connection.run_sync(transitions.succeed, one, "1", QUICK))
    await send(engine, lambda connection: transitions.succeed_many(connection, {many: "1"}, {many: QUICK}))

    assert await attempts(engine, one.job_id) == await attempts(engine, many.job_id) == []


async def test_a_lost_success_with_something_to_tell_leaves_nothing(engine: AsyncEngine) -> None:
    held = await a_held_job(engine)
    stale = Held(held.job_id, uuid4())

    assert not await send(engine, lambda connection: connection.run_sync(transitions.succeed, stale, "1", SLOW))
    assert not await send(engine, lambda connection: transitions.succeed_many(connection, {stale: "1"}, {stale: SLOW}))

    assert await attempts(engine, held.job_id) == []


async def test_of_many_successes_those_with_something_to_tell_leave_an_attempt(engine: AsyncEngine) -> None:
    held = [await a_held_job(engine) for _ in range(3)]
    results, remarks = dict.fromkeys(held, "1"), {held[1]: SLOW}

    done = await send(engine, lambda connection: transitions.succeed_many(connection, results, remarks))

    assert done == set(held)
    assert [len(await attempts(engine, one.job_id)) for one in held] == [0, 1, 0]
    [told] = await attempts(engine, held[1].job_id)
    assert (told.blocked, told.lazy_loads) == (SLOW.blocked, SLOW.lazy_loads)


async def test_an_attempt_that_did_not_succeed_tells_also_little_things(engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    await send(engine, lambda connection: transitions.fail(connection, held, ERROR, remarks=QUICK))

    [told] = await attempts(engine, held.job_id)
    assert (told.blocked, told.lazy_loads) == (QUICK.blocked, QUICK.lazy_loads)
