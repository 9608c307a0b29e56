"""The jobs of a worker that stopped beating: who is blamed, and where they go."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.db.moves import VERBS, Verb, a_held_job, send
from tests.support import a_job, attempts, row
from worker.core.states import Ending, JobState
from worker.db import transitions
from worker.db.ids import uuid7
from worker.db.transitions import Held, Moved


async def rescue(engine: AsyncEngine, dead: UUID, *, announced: bool = False, max_crashes: int = 3) -> list[Moved]:
    moved: list[Moved] = await send(
        engine,
        lambda connection: transitions.rescue(
            connection, dead, had_announced_its_stop=announced, max_crashes=max_crashes, reason="stopped beating"
        ),
    )
    return moved


async def running(engine: AsyncEngine, dead: UUID, **columns: Any) -> UUID:
    return await a_job(engine, state=JobState.RUNNING, worker_id=dead, **columns)


async def crashes(engine: AsyncEngine, ids: list[UUID]) -> list[int]:
    return [(await row(engine, job_id)).crashes for job_id in ids]


async def test_a_crash_is_blamed_on_all_jobs_that_ran_there(engine: AsyncEngine) -> None:
    dead = uuid7()
    ids = [await running(engine, dead, crashes=before) for before in (0, 0, 1)]

    moved = await rescue(engine, dead)

    assert {job.job_id for job in moved} == set(ids)
    assert {(job.state, job.ending) for job in moved} == {(JobState.QUEUED, Ending.CRASHED)}
    assert await crashes(engine, ids) == [1, 1, 2]


async def test_a_worker_that_had_announced_its_stop_costs_its_jobs_nothing(engine: AsyncEngine) -> None:
    dead = uuid7()
    ids = [await running(engine, dead, crashes=2), await running(engine, dead)]

    moved = await rescue(engine, dead, announced=True)

    assert {(job.state, job.ending) for job in moved} == {(JobState.QUEUED, Ending.RELEASED)}
    assert await crashes(engine, ids) == [2, 0]
    assert [(await row(engine, job_id)).failures for job_id in ids] == [0, 0]


async def test_a_job_that_crashed_too_often_fails(engine: AsyncEngine) -> None:
    dead = uuid7()
    last, earlier = await running(engine, dead, crashes=2), await running(engine, dead, crashes=1)

    await rescue(engine, dead, max_crashes=3)

    job = await row(engine, last)
    assert (job.state, job.crashes, job.error) == (JobState.FAILED, 3, "stopped beating")
    assert job.finished_at is not None
    assert (await row(engine, earlier)).state == JobState.QUEUED


async def test_a_flagged_job_is_cancelled(engine: AsyncEngine) -> None:
    dead = uuid7()
    flagged = await running(engine, dead, cancel_requested=True)

    [moved] = await rescue(engine, dead)

    assert moved.state == (await row(engine, flagged)).state == JobState.CANCELLED


async def test_a_rescued_job_is_due_at_once_and_has_noted_its_attempt(engine: AsyncEngine) -> None:
    dead = uuid7()
    job_id = await running(engine, dead, attempt=5)
    before = await row(engine, job_id)

    [moved] = await rescue(engine, dead)

    [noted] = await attempts(engine, job_id)
    assert (noted.number, noted.token, noted.worker_id) == (5, before.token, dead)
    assert (noted.ending, noted.error, noted.started_at) == ("crashed", "stopped beating", before.started_at)
    assert moved.wait.total_seconds() <= 0
    assert (await row(engine, job_id)).attempt == 5


async def test_only_the_running_jobs_of_the_dead_worker_are_moved(engine: AsyncEngine) -> None:
    dead = uuid7()
    final = await a_job(engine, state=JobState.SUCCEEDED, worker_id=dead, token=uuid4())
    waiting = await a_job(engine, worker_id=dead, token=uuid4())
    before = [await row(engine, final), await row(engine, waiting)]

    moved = await rescue(engine, dead)

    assert moved == []
    assert [await row(engine, final), await row(engine, waiting)] == before


@pytest.mark.leaves_running
async def test_the_jobs_of_others_stay_theirs(engine: AsyncEngine) -> None:
    other = await running(engine, uuid7())

    moved = await rescue(engine, uuid7())

    assert moved == []
    assert (await row(engine, other)).state == JobState.RUNNING


async def test_a_row_that_somebody_holds_is_passed_by_and_rescued_later(engine: AsyncEngine) -> None:
    dead = uuid7()
    locked, free = await running(engine, dead), await running(engine, dead)

    async with engine.connect() as zombie:
        await zombie.execute(text("SELECT 1 FROM exarq.job WHERE id = :id FOR NO KEY UPDATE"), {"id": locked})
        first = await rescue(engine, dead)
    second = await rescue(engine, dead)

    assert [job.job_id for job in first] == [free]
    assert [job.job_id for job in second] == [locked]


async def test_a_foreign_key_that_looks_at_a_row_does_not_hide_it(engine: AsyncEngine) -> None:
    dead = uuid7()
    job_id = await running(engine, dead)

    async with engine.connect() as other:
        await other.execute(text("SELECT 1 FROM exarq.job WHERE id = :id FOR KEY SHARE"), {"id": job_id})
        moved = await rescue(engine, dead)

    assert [job.job_id for job in moved] == [job_id]


@pytest.mark.leaves_running
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
async def test_a_rescued_attempt_can_do_nothing_to_the_one_that_followed(engine: AsyncEngine, verb: Verb) -> None:
    dead = uuid7()
    old = await a_held_job(engine, worker_id=dead)
    await rescue(engine, dead)
    [again] = await send(
        engine,
        lambda c: transitions.claim(c, [old.job_id], token=uuid4(), worker_id=uuid7(), may_take_suspect=True),
    )
    before = await row(engine, old.job_id)

    answer = await send(engine, lambda connection: verb(connection, old))

    assert not answer
    assert await row(engine, old.job_id) == before
    assert again.held != Held(old.job_id, old.token)
