"""Somebody asks to cancel a job: what waits ends, what runs is flagged, what is final stays, whoever moves it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.db.moves import LEAVING, Verb, a_held_job, fail, send, succeed, unless_locked
from tests.support import a_job, attempts, row, until
from worker.core.states import FINAL, JobState
from worker.db import reads, transitions
from worker.db.ids import uuid7
from worker.db.transitions import CancelRequest

pytestmark = pytest.mark.leaves_running

REASON = "somebody asked"


async def ask(connection: AsyncConnection, job_id: UUID) -> CancelRequest | None:
    return await connection.run_sync(transitions.request_cancel, job_id, REASON)


async def asked(engine: AsyncEngine, job_id: UUID) -> CancelRequest | None:
    found: CancelRequest | None = await send(engine, lambda connection: ask(connection, job_id))
    return found


async def claim(connection: AsyncConnection, job_id: UUID) -> list[Any]:
    return list(await transitions.claim(connection, [job_id], token=uuid4(), worker_id=uuid7(), may_take_suspect=True))


# ── alone ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_job_that_waits_is_cancelled_as_a_running_one_would_be(engine: AsyncEngine) -> None:
    job, ran = await a_job(engine, error="the last attempt's"), await a_held_job(engine)

    request = await asked(engine, job)
    await send(engine, lambda connection: transitions.cancel(connection, ran, REASON))

    found, other = await row(engine, job), await row(engine, ran.job_id)
    assert request is not None
    assert (request.stood, request.worker_id) == (JobState.QUEUED, None)
    assert (found.state, found.error) == (other.state, other.error) == (JobState.CANCELLED, REASON)
    assert found.finished_at >= found.enqueued_at
    assert found.cancel_requested
    assert (found.failures, found.attempt, found.token, found.result) == (0, 0, None, None)
    assert await attempts(engine, job) == []


async def test_a_job_that_waits_for_another_attempt_keeps_what_it_has_behind_it(engine: AsyncEngine) -> None:
    job = await a_job(engine, attempt=3, failures=2, crashes=1, error="ValueError: no", token=uuid4())
    before = await row(engine, job)

    await asked(engine, job)

    found = await row(engine, job)
    assert (found.attempt, found.failures, found.crashes, found.token) == (3, 2, 1, before.token)
    assert (found.state, found.error) == (JobState.CANCELLED, REASON)


async def test_a_job_that_runs_is_only_flagged_and_its_worker_is_told_of(engine: AsyncEngine) -> None:
    worker = uuid7()
    held = await a_held_job(engine, worker_id=worker, error="the last attempt's")
    before = await row(engine, held.job_id)

    request = await asked(engine, held.job_id)

    async with engine.connect() as connection:
        installation = await reads.installation_id(connection)
    assert request == CancelRequest(JobState.RUNNING, worker, installation)
    found = await row(engine, held.job_id)
    assert found._asdict() == {**before._asdict(), "cancel_requested": True}


async def test_asking_again_is_answered_again(engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    first, second = await asked(engine, held.job_id), await asked(engine, held.job_id)

    assert first == second
    assert first is not None


@pytest.mark.parametrize("state", sorted(FINAL))
async def test_a_job_that_is_final_stays_as_it_is(engine: AsyncEngine, state: JobState) -> None:
    held = await a_held_job(engine, state=state)
    before = await row(engine, held.job_id)

    request = await asked(engine, held.job_id)

    assert request is not None
    assert request.stood == state
    assert await row(engine, held.job_id) == before


async def test_a_job_that_is_not_there_is_no_job(engine: AsyncEngine) -> None:
    other = await a_job(engine)

    assert await asked(engine, uuid7()) is None
    assert (await row(engine, other)).state == JobState.QUEUED


async def test_what_was_asked_in_a_transaction_that_rolls_back_was_never_asked(engine: AsyncEngine) -> None:
    job, held = await a_job(engine), await a_held_job(engine)
    before = [await row(engine, job), await row(engine, held.job_id)]

    async with engine.connect() as connection:
        await ask(connection, job)
        await ask(connection, held.job_id)
        await connection.rollback()

    assert [await row(engine, job), await row(engine, held.job_id)] == before


# ── while somebody else moves the job ───────────────────────────────────────────────────────────────────────────────


async def test_a_claim_that_was_first_makes_it_a_running_job(engine: AsyncEngine) -> None:
    job = await a_job(engine)

    (claimed,), request = await _one_after_the_other(
        engine, lambda connection: claim(connection, job), lambda connection: ask(connection, job)
    )

    found = await row(engine, job)
    assert (request.stood, request.worker_id) == (JobState.RUNNING, found.worker_id)
    assert (found.state, found.cancel_requested, found.token) == (JobState.RUNNING, True, claimed.held.token)
    assert (found.finished_at, found.error) == (None, None)


async def test_a_claim_passes_by_what_is_being_cancelled(engine: AsyncEngine) -> None:
    job = await a_job(engine)

    async with engine.connect() as first, engine.begin() as second:
        await ask(first, job)
        claimed = await claim(second, job)
        await first.commit()

    assert claimed == []
    assert (await row(engine, job)).state == JobState.CANCELLED
    assert await send(engine, lambda connection: claim(connection, job)) == []


@pytest.mark.parametrize(("verb", "state"), [(succeed, JobState.SUCCEEDED), (fail, JobState.FAILED)])
async def test_an_end_that_was_first_leaves_nothing_to_cancel(engine: AsyncEngine, verb: Verb, state: JobState) -> None:
    held = await a_held_job(engine)

    _, request = await _one_after_the_other(
        engine, lambda connection: verb(connection, held), lambda connection: ask(connection, held.job_id)
    )

    found = await row(engine, held.job_id)
    assert request.stood == state
    assert (found.state, found.cancel_requested) == (state, False)


async def test_a_success_that_comes_later_has_succeeded_all_the_same(engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    request, succeeded = await _one_after_the_other(
        engine, lambda connection: ask(connection, held.job_id), lambda connection: succeed(connection, held)
    )

    assert (request.stood, succeeded) == (JobState.RUNNING, True)
    assert (await row(engine, held.job_id)).state == JobState.SUCCEEDED


@pytest.mark.parametrize("verb", [verb for verb in LEAVING if verb is not fail], ids=lambda verb: str(verb.__name__))
async def test_whatever_would_queue_the_job_again_sees_a_request_that_was_first(
    engine: AsyncEngine, verb: Verb
) -> None:
    held = await a_held_job(engine)

    async with engine.begin() as connection:
        request = await ask(connection, held.job_id)
        moved_meanwhile = await unless_locked(send(engine, lambda connection: verb(connection, held)))
    await send(engine, lambda connection: verb(connection, held))

    found = await row(engine, held.job_id)
    assert request is not None
    assert request.stood == JobState.RUNNING
    assert not moved_meanwhile
    assert found.state == JobState.CANCELLED
    assert found.finished_at is not None


async def test_a_rescue_sees_a_request_too(engine: AsyncEngine) -> None:
    dead = uuid7()
    held = await a_held_job(engine, worker_id=dead)
    await asked(engine, held.job_id)

    await send(
        engine,
        lambda connection: transitions.rescue(
            connection, dead, had_announced_its_stop=False, max_crashes=3, reason="silent"
        ),
    )

    found = await row(engine, held.job_id)
    assert (found.state, found.crashes) == (JobState.CANCELLED, 1)


async def _one_after_the_other(
    engine: AsyncEngine,
    first: Callable[[AsyncConnection], Awaitable[Any]],
    second: Callable[[AsyncConnection], Awaitable[Any]],
) -> tuple[Any, Any]:
    """The second is sent while the first is not committed yet, so that it has to wait for it."""
    async with engine.connect() as connection:
        said = await first(connection)
        waiting = asyncio.create_task(send(engine, second))
        await until(lambda: _somebody_waits_for_a_lock(engine), "the second waits for the first")
        await connection.commit()
        return said, await waiting


async def _somebody_waits_for_a_lock(engine: AsyncEngine) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with engine.connect() as connection:
        return bool((await connection.execute(text(query))).scalar_one())
