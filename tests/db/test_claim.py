"""Queued → running: due by PostgreSQL's clock, never twice, at most one suspect."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.db.moves import send
from tests.support import a_job, row
from worker.core.states import JobState
from worker.db import transitions
from worker.db.ids import uuid7
from worker.db.transitions import ClaimedJob

pytestmark = pytest.mark.leaves_running

ME = uuid7()
LATER = timedelta(minutes=5)


async def by_id(connection: AsyncConnection, ids: list[UUID], **options: Any) -> list[ClaimedJob]:
    given: dict[str, Any] = {"token": uuid4(), "worker_id": ME, "may_take_suspect": True, **options}
    return await transitions.claim(connection, ids, **given)


async def by_scan(connection: AsyncConnection, _: list[UUID], **options: Any) -> list[ClaimedJob]:
    given: dict[str, Any] = {"room": 100, "token": uuid4(), "worker_id": ME, "may_take_suspect": True, **options}
    return await transitions.claim_by_scan(connection, given.pop("queues", ["default"]), **given)


BOTH = pytest.mark.parametrize("claim", [by_id, by_scan])


def ids_of(claimed: list[ClaimedJob]) -> set[UUID]:
    return {job.held.job_id for job in claimed}


@BOTH
async def test_a_claim_takes_what_is_due_and_notes_who_holds_it(engine: AsyncEngine, claim: Any) -> None:
    job_id, token = await a_job(engine, args={"a": [1]}, attempt=2, failures=1), uuid4()

    [claimed] = await send(engine, lambda c: claim(c, [job_id], token=token))

    job = await row(engine, job_id)
    assert (job.state, job.token, job.worker_id, job.attempt) == (JobState.RUNNING, token, ME, 3)
    assert abs(datetime.now(UTC) - job.started_at) < timedelta(seconds=10)
    assert (claimed.held.job_id, claimed.held.token) == (job_id, token)
    assert (claimed.name, claimed.queue, claimed.args) == ("tests.noop", "default", '{"a": [1]}')
    assert (claimed.attempt, claimed.failures, claimed.crashes) == (3, 1, 0)
    assert claimed.enqueued_at == job.enqueued_at
    assert timedelta(0) < claimed.overdue < timedelta(seconds=10)


@BOTH
async def test_a_claim_takes_nothing_that_is_not_due_by_the_servers_clock(engine: AsyncEngine, claim: Any) -> None:
    async with engine.begin() as connection:
        now = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
    later = await a_job(engine, run_at=now + LATER)

    claimed = await send(engine, lambda c: claim(c, [later]))

    assert claimed == []
    assert (await row(engine, later)).state == JobState.QUEUED


@BOTH
async def test_a_job_that_falls_due_during_a_transaction_is_taken_in_it(engine: AsyncEngine, claim: Any) -> None:
    async with engine.begin() as connection:
        now = (await connection.execute(text("SELECT now()"))).scalar_one()
        soon = await a_job(engine, run_at=now + timedelta(milliseconds=200))
        await connection.execute(text("SELECT pg_sleep(0.3)"))

        claimed = await claim(connection, [soon])

    assert ids_of(claimed) == {soon}


@BOTH
@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.QUEUED])
async def test_a_claim_takes_nothing_that_is_not_queued(engine: AsyncEngine, claim: Any, state: JobState) -> None:
    job_id = await a_job(engine, state=state)
    before = await row(engine, job_id)

    claimed = await send(engine, lambda c: claim(c, [job_id]))

    assert claimed == []
    assert await row(engine, job_id) == before


@BOTH
async def test_a_claim_passes_by_rows_that_somebody_is_moving(engine: AsyncEngine, claim: Any) -> None:
    locked, free = await a_job(engine), await a_job(engine)

    async with engine.connect() as other:
        await other.execute(text("SELECT 1 FROM exarq.job WHERE id = :id FOR NO KEY UPDATE"), {"id": locked})
        claimed = await send(engine, lambda c: claim(c, [locked, free]))

    assert ids_of(claimed) == {free}


@BOTH
async def test_a_foreign_key_that_looks_at_a_row_does_not_hide_it(engine: AsyncEngine, claim: Any) -> None:
    job_id = await a_job(engine)

    async with engine.connect() as other:
        await other.execute(text("SELECT 1 FROM exarq.job WHERE id = :id FOR KEY SHARE"), {"id": job_id})
        claimed = await send(engine, lambda c: claim(c, [job_id]))

    assert ids_of(claimed) == {job_id}


@BOTH
async def test_claims_at_the_same_time_never_share_a_job(engine: AsyncEngine, claim: Any) -> None:
    ids = [await a_job(engine) for _ in range(60)]

    rounds = await asyncio.gather(*[send(engine, lambda c: claim(c, ids)) for _ in range(5)])

    taken = [job.held.job_id for claimed in rounds for job in claimed]
    assert sorted(taken) == sorted(ids)
    assert {(await row(engine, job_id)).attempt for job_id in ids} == {1}


@BOTH
async def test_a_claim_takes_one_suspect_at_the_most_and_all_innocents(engine: AsyncEngine, claim: Any) -> None:
    suspects = [await a_job(engine, crashes=2) for _ in range(3)]
    innocents = [await a_job(engine) for _ in range(3)]

    claimed = await send(engine, lambda c: claim(c, suspects + innocents))

    assert ids_of(claimed) >= set(innocents)
    assert [job.suspect for job in claimed].count(True) == 1
    assert len(claimed) == 4


@BOTH
async def test_a_claim_takes_no_suspect_where_one_runs(engine: AsyncEngine, claim: Any) -> None:
    suspect, innocent = await a_job(engine, crashes=2), await a_job(engine)

    claimed = await send(engine, lambda c: claim(c, [suspect, innocent], may_take_suspect=False))

    assert ids_of(claimed) == {innocent}
    assert (await row(engine, suspect)).state == JobState.QUEUED


async def test_a_claim_by_id_takes_nothing_else(engine: AsyncEngine) -> None:
    asked, other = await a_job(engine), await a_job(engine)

    claimed = await send(engine, lambda c: by_id(c, [asked, uuid7()]))

    assert ids_of(claimed) == {asked}
    assert (await row(engine, other)).state == JobState.QUEUED


async def test_a_scan_takes_the_longest_due_first_and_no_more_than_it_has_room_for(engine: AsyncEngine) -> None:
    now = datetime.now(UTC)
    by_due = [await a_job(engine, run_at=now - timedelta(minutes=minutes)) for minutes in (1, 4, 2, 3)]

    claimed = await send(engine, lambda c: by_scan(c, [], room=2))

    assert ids_of(claimed) == {by_due[1], by_due[3]}


async def test_a_scan_looks_behind_what_others_hold(engine: AsyncEngine) -> None:
    fill = """
        INSERT INTO exarq.job (id, name, queue, args, run_at)
        SELECT gen_random_uuid(), 'tests.noop', 'held', '{}', now() - interval '1 minute' FROM generate_series(1, 1000)
    """
    async with engine.begin() as connection:
        await connection.execute(text(fill))
    free = [await a_job(engine, queue="held") for _ in range(2)]

    async with engine.begin() as holder:
        await holder.execute(text("SELECT FROM exarq.job WHERE run_at < now() - interval '30 s' FOR SHARE"))
        claimed = await send(engine, lambda c: by_scan(c, [], queues=["held"], room=1))

    assert ids_of(claimed) == {free[0]}


async def test_a_scan_takes_only_from_its_queues(engine: AsyncEngine) -> None:
    first, second = await a_job(engine, queue="a"), await a_job(engine, queue="b")
    await a_job(engine, queue="c")

    claimed = await send(engine, lambda c: by_scan(c, [], queues=["a", "b"]))

    assert ids_of(claimed) == {first, second}


async def test_a_scan_is_not_blocked_by_suspects_that_it_may_not_take(engine: AsyncEngine) -> None:
    long_ago = datetime.now(UTC) - LATER
    for _ in range(3):
        await a_job(engine, crashes=2, run_at=long_ago)
    innocent = await a_job(engine)

    claimed = await send(engine, lambda c: by_scan(c, [], room=2, may_take_suspect=False))

    assert ids_of(claimed) == {innocent}
