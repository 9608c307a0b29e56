"""A person wants jobs again, or gone: what has ended is moved, what has not is left, whoever moves it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.db.moves import a_held_job, fail, send, succeed
from tests.support import a_job, a_locked_row, attempts, row, state, until
from worker.core.states import FINAL, JobState
from worker.db import people, transitions, workers
from worker.db.ids import uuid7
from worker.db.models import Attempt
from worker.db.people import Again

pytestmark = pytest.mark.leaves_running

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
ENDED = {"finished_at": NOW - 2 * HOUR, "attempt": 3, "failures": 2, "crashes": 1, "error": "ValueError: no"}


async def retry(engine: AsyncEngine, job: UUID) -> Again | None:
    found: Again | None = await send(engine, lambda connection: connection.run_sync(people.retry, job))
    return found


async def moved(engine: AsyncEngine, verb: Any, jobs: Collection[UUID], states: Any = None) -> dict[UUID, bool]:
    found = await send(engine, lambda connection: verb(connection, list(jobs), states=states))
    return {one.job_id: one.moved for one in found}


async def alive(engine: AsyncEngine, worker: UUID) -> None:
    await send(engine, lambda connection: workers.register(connection, worker, queues=["a"], concurrency=1))


# ── again ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ended", sorted(FINAL))
async def test_what_has_ended_starts_over_and_its_attempts_are_numbered_on(engine: AsyncEngine, ended: str) -> None:
    job = await a_job(
        engine,
        **{**ENDED, "state": ended, "token": uuid4(), "worker_id": uuid7(), "cancel_requested": True},
        result={"a": 1} if ended == "succeeded" else None,
        progress={"done": 1},
        contended=4,
        run_at=NOW - 3 * HOUR,
        first_due_at=NOW - 3 * HOUR,
        expires_at=NOW - HOUR,
    )

    again = await retry(engine, job)

    assert again is not None
    assert (again.stood, again.moved, again.name, again.queue) == (ended, True, "tests.noop", "default")
    found = await row(engine, job)
    assert (found.state, found.attempt) == (JobState.QUEUED, 3)
    assert (found.failures, found.crashes, found.contended) == (0, 0, 0)
    assert (found.token, found.worker_id, found.finished_at, found.error) == (None, None, None, None)
    assert (found.result, found.progress, found.expires_at, found.cancel_requested) == (None, None, None, False)
    assert found.run_at > NOW - timedelta(minutes=1)
    assert found.first_due_at > NOW - timedelta(minutes=1), "else a worker that does not know it would fail it at once"
    (claimed,) = await send(
        engine,
        lambda connection: transitions.claim(
            connection, [job], token=uuid4(), worker_id=uuid7(), may_take_suspect=False
        ),
    )
    assert claimed.attempt == 4


async def test_a_success_that_runs_again_leaves_its_attempt(engine: AsyncEngine) -> None:
    token = uuid4()
    job = await a_job(engine, **{**ENDED, "state": "succeeded", "error": None, "token": token}, result=1)
    told = await a_job(engine, **{**ENDED, "state": "succeeded", "error": None, "token": token}, result=1)
    async with engine.begin() as connection:
        already = {"job_id": told, "token": token, "number": 3, "ending": "succeeded", "error": "lazy"}
        await connection.execute(insert(Attempt).values(**already))

    await retry(engine, job)
    await retry(engine, told)

    (left,), (kept,) = await attempts(engine, job), await attempts(engine, told)
    assert (left.number, left.token, left.ending, left.error) == (3, token, "succeeded", None)
    assert kept.error == "lazy"


@pytest.mark.parametrize("other", ["queued", "running"])
async def test_what_has_not_ended_stays(engine: AsyncEngine, other: str) -> None:
    job = await a_job(engine, state=other)
    before = await row(engine, job)

    again = await retry(engine, job)

    assert again is not None
    assert (again.stood, again.moved) == (other, False)
    assert await row(engine, job) == before
    assert await retry(engine, uuid7()) is None


async def test_a_deadline_that_has_not_passed_is_kept(engine: AsyncEngine) -> None:
    job = await a_job(engine, state="failed", finished_at=NOW, expires_at=NOW + HOUR)

    await retry(engine, job)

    assert (await row(engine, job)).expires_at == NOW + HOUR


async def test_of_many_only_those_in_the_named_states_are_moved(engine: AsyncEngine) -> None:
    failed, cancelled = [await a_job(engine, state=ended, finished_at=NOW) for ended in ("failed", "cancelled")]

    found = await moved(engine, people.retry_many, [failed, cancelled, uuid7()], {JobState.FAILED})

    assert found == {failed: True, cancelled: False}
    assert await state(engine, cancelled) == "cancelled"


# ── a unique key ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "holder",
    [
        {"state": "queued"},
        {"state": "running", "unique_for": "until_done"},
        {"state": "succeeded", "unique_until": NOW + HOUR},
    ],
)
async def test_a_key_that_another_job_holds_is_told_and_nothing_moves(engine: AsyncEngine, holder: Any) -> None:
    ours = await a_job(engine, state="failed", finished_at=NOW, unique_key="k")
    await a_job(engine, unique_key="k", **holder)
    others = [await a_job(engine, state="failed", finished_at=NOW, **key) for key in ({"unique_key": "j"}, {})]

    again = await retry(engine, ours)
    found = await moved(engine, people.retry_many, [ours, *others])

    assert again is not None
    assert (again.moved, again.key_is_taken) == (False, True)
    assert found == {ours: False, **dict.fromkeys(others, True)}


async def test_a_key_whose_holder_has_ended_and_whose_time_is_over_is_free(engine: AsyncEngine) -> None:
    ours = await a_job(engine, state="failed", finished_at=NOW, unique_key="k")
    other = await a_job(engine, state="failed", finished_at=NOW, unique_key="j")
    for key in "kj":
        await a_job(engine, state="succeeded", finished_at=NOW, unique_key=key, unique_until=NOW - HOUR)

    again = await retry(engine, ours)
    found = await moved(engine, people.retry_many, [other])

    assert again is not None
    assert again.moved
    assert found == {other: True}


async def test_a_key_that_is_held_until_the_start_only_keeps_no_started_job_from_a_retry(engine: AsyncEngine) -> None:
    ours = await a_job(engine, state="failed", finished_at=NOW, attempt=2, unique_key="k", unique_for="until_started")
    await a_job(engine, unique_key="k", unique_for="until_started")

    again = await retry(engine, ours)

    assert again is not None
    assert again.moved


async def test_of_several_with_one_key_the_newest_that_is_meant_gets_it(engine: AsyncEngine) -> None:
    key = {"unique_key": "k", "finished_at": NOW}
    old, new = [await a_job(engine, id=UUID(int=number), state="failed", **key) for number in (1, 2)]
    newest = await a_job(engine, id=UUID(int=3), state="cancelled", **key)

    found = await moved(engine, people.retry_many, [old, new, newest], {JobState.FAILED})

    assert found == {old: False, new: True, newest: False}


async def test_a_key_that_is_taken_while_the_move_waits_is_refused_by_the_index(engine: AsyncEngine) -> None:
    job = await a_job(engine, state="failed", finished_at=NOW, unique_key="k")

    async with engine.begin() as connection:
        insertion = text(
            "INSERT INTO exarq.job (id, name, queue, args, unique_key)"
            " VALUES (gen_random_uuid(), 'tests.noop', 'default', '{}', 'k')"
        )
        await connection.execute(insertion)
        waiting = asyncio.create_task(retry(engine, job))
        await until(lambda: _somebody_waits(engine), "the retry waits for the key")
    with pytest.raises(IntegrityError):
        await waiting


# ── a success that its worker may still ask for ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ended", "age", "worker_lives", "moves"),
    [
        ("succeeded", timedelta(seconds=30), True, False),
        ("succeeded", timedelta(seconds=61), True, True),
        ("succeeded", timedelta(seconds=30), False, True),
        ("failed", timedelta(0), True, True),
        ("cancelled", timedelta(0), True, True),
    ],
)
@pytest.mark.parametrize("verb", [people.retry_many, people.delete_many])
async def test_a_young_success_stays_while_its_worker_may_still_ask_for_it(
    engine: AsyncEngine, ended: str, age: timedelta, worker_lives: bool, moves: bool, verb: Any
) -> None:
    worker = uuid7()
    if worker_lives:
        await alive(engine, worker)
    job = await a_job(engine, state=ended, finished_at=datetime.now(UTC) - age, worker_id=worker, token=uuid4())

    found = await send(engine, lambda connection: verb(connection, [job]))

    assert [(one.moved, one.asked_after) for one in found] == [(moves, not moves)]


# ── gone ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_has_ended_goes_with_its_attempts_and_the_rest_stays(engine: AsyncEngine) -> None:
    gone = await a_held_job(engine)
    await send(engine, lambda connection: fail(connection, gone))
    other, waits, runs = (
        await a_job(engine, state="cancelled"),
        await a_job(engine),
        await a_job(engine, state="running"),
    )

    found = await moved(engine, people.delete_many, [gone.job_id, other, waits, runs], {JobState.FAILED})
    unnamed = await moved(engine, people.delete_many, [waits, runs])

    assert found == {gone.job_id: True, other: False, waits: False, runs: False}
    assert unnamed == {waits: False, runs: False}
    assert await attempts(engine, gone.job_id) == []
    assert [await state(engine, job) for job in (gone.job_id, other, waits)] == [None, "cancelled", "queued"]


# ── many are cancelled ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_of_many_each_is_cancelled_as_one_alone_and_only_in_the_named_states(engine: AsyncEngine) -> None:
    worker = uuid7()
    waits, runs = await a_job(engine), await a_job(engine, state="running", worker_id=worker)
    ended = await a_job(engine, state="failed")

    first = await send(
        engine,
        lambda connection: people.request_cancel_many(connection, [waits, runs], "asked", states={JobState.QUEUED}),
    )
    second = await send(engine, lambda connection: people.request_cancel_many(connection, [runs, ended], "asked"))

    assert {(id_, request.stood, wanted) for id_, request, wanted in first} == {
        (waits, "queued", True),
        (runs, "running", False),
    }
    assert {(request.stood, request.worker_id) for _, request, _ in second} == {("running", worker), ("failed", None)}
    assert [await state(engine, job) for job in (waits, runs, ended)] == ["cancelled", "running", "failed"]
    assert (await row(engine, waits)).error == "asked"
    assert (await row(engine, runs)).cancel_requested


# ── while somebody else moves them ──────────────────────────────────────────────────────────────────────────────────


async def cancel_many(connection: AsyncConnection, ids: list[UUID]) -> Any:
    return [(id_, wanted) for id_, _, wanted in await people.request_cancel_many(connection, ids, "asked")]


@pytest.mark.parametrize("verb", [people.retry_many, people.delete_many, cancel_many])
async def test_moves_of_many_pass_by_what_another_transaction_holds(
    engine: AsyncEngine, verb: Callable[..., Awaitable[list[Any]]]
) -> None:
    ended = "queued" if verb is cancel_many else "failed"
    held, free = [await a_job(engine, state=ended, finished_at=None if ended == "queued" else NOW) for _ in range(2)]

    async with a_locked_row(engine, held):
        found = await send(engine, lambda connection: verb(connection, [held, free]))

    assert len(found) == 1
    assert await state(engine, held) == ended
    assert await state(engine, free) != ended


async def test_one_that_ends_while_it_is_wanted_again_is_waited_for_and_starts_over(engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    async with engine.begin() as connection:
        await succeed(connection, held)
        waiting = asyncio.create_task(retry(engine, held.job_id))
        await until(lambda: _somebody_waits(engine), "the retry waits")
    again = await waiting

    assert again is not None
    assert (again.stood, again.moved) == ("succeeded", True)
    assert [left.ending for left in await attempts(engine, held.job_id)] == ["succeeded"]
    assert await state(engine, held.job_id) == "queued"


async def test_an_attempt_that_ran_before_the_retry_can_write_no_more(engine: AsyncEngine) -> None:
    held = await a_held_job(engine)
    await send(engine, lambda connection: fail(connection, held))
    await retry(engine, held.job_id)

    assert not await send(engine, lambda connection: succeed(connection, held))
    assert await state(engine, held.job_id) == "queued"


async def _somebody_waits(engine: AsyncEngine) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with engine.connect() as connection:
        return bool((await connection.execute(text(query))).scalar_one())
