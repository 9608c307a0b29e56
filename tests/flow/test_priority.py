"""Priority and start deadline, from the enqueue to the run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.flow.helpers import NAME, run_job
from tests.support import a_job, a_work, attempts, hints, row, run_all
from worker.core.errors import ArgumentsInvalid, DefinitionError
from worker.core.outcome import Snooze
from worker.core.priority import STEP
from worker.core.registry import Registry
from worker.db import transitions
from worker.db.ids import uuid7
from worker.flow.availability import Availability
from worker.flow.enqueue import call_by_name
from worker.flow.job import JobFunction
from worker.flow.publish import Publisher
from worker.flow.work import Work
from worker.settings import Settings
from worker.upkeep import reconcile

Sessions = async_sessionmaker[AsyncSession]
ran: list[int] = []


async def snoozes_once(session: AsyncSession, number: int = 0) -> None:
    ran.append(number)
    if len(ran) == 1:
        raise Snooze(0)


JOB = JobFunction(snoozes_once, name=NAME, priority=8, expires=60)
REGISTRY = Registry()
REGISTRY.register(JOB)


@pytest.fixture
async def work(settings: Settings) -> AsyncIterator[Work]:
    ran.clear()
    async with a_work(settings, REGISTRY) as work:
        yield work


async def test_a_job_keeps_its_priority_from_the_enqueue_through_a_snooze_to_the_end(
    engine: AsyncEngine, sessions: Sessions, publisher: Publisher, redis: ArqRedis, work: Work, settings: Settings
) -> None:
    async with sessions.begin() as session:
        of_the_definition = await JOB.enqueue(session)
        its_own = await JOB.options(priority=2).enqueue(session)
    await publisher.flush()
    at_first = [set(await hints(redis, priority=priority)) for priority in (8, 2)]
    await run_job(work, of_the_definition.id)
    await work.publisher.flush()
    await redis.flushdb()
    await redis.set("exarq:test:ours", "1")
    await reconcile.reconcile(work, redis, Availability(redis))

    assert at_first == [{str(of_the_definition.id)}, {str(its_own.id)}]
    assert [set(await hints(redis, priority=priority)) for priority in (8, 2)] == at_first
    await run_all(settings, REGISTRY)
    assert {(await row(engine, one.id)).state for one in (of_the_definition, its_own)} == {"succeeded"}
    assert [await hints(redis, priority=priority) for priority in (8, 2)] == [{}, {}]


async def test_a_snoozed_job_is_published_into_its_lane(sessions: Sessions, redis: ArqRedis, work: Work) -> None:
    async with sessions.begin() as session:
        handle = await JOB.enqueue(session)
    await run_job(work, handle.id)
    await work.publisher.flush()

    assert set(await hints(redis, priority=8)) == {str(handle.id)}


async def test_a_scan_takes_the_first_by_rank(engine: AsyncEngine, work: Work) -> None:
    now = datetime.now(UTC)
    jobs = {
        name: await a_job(engine, priority=priority, run_at=now - waited)
        for name, priority, waited in [
            ("ordinary", 5, timedelta(seconds=2)),
            ("urgent", 0, timedelta(seconds=1)),
            ("bulk", 9, timedelta(seconds=3)),
            ("bulk that has aged", 9, 4 * STEP + timedelta(seconds=9)),
        ]
    }
    order = []
    for _ in jobs:
        async with work.processor.begin() as connection:
            (job,) = await transitions.claim_by_scan(
                connection, ["default"], room=1, token=uuid4(), worker_id=uuid7(), may_take_suspect=True
            )
            await transitions.cancel(connection, job.held, "seen")
        order.append(job.held.job_id)

    assert order == [jobs[name] for name in ("urgent", "bulk that has aged", "ordinary", "bulk")]


# ── the start deadline ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [NAME, "nobody.knows"])
async def test_a_job_that_has_not_started_by_its_deadline_is_cancelled_and_its_function_not_called(
    engine: AsyncEngine, work: Work, name: str
) -> None:
    over = datetime.now(UTC) - timedelta(seconds=1)
    job_id = await a_job(engine, name=name, expires_at=over, run_at=over - timedelta(seconds=1))

    await run_job(work, job_id)

    found, (attempt,) = await row(engine, job_id), await attempts(engine, job_id)
    assert (found.state, found.failures, ran) == ("cancelled", 0, [])
    assert found.error == attempt.error == f"expired: no attempt may start after {over}"
    assert attempt.ending == "cancelled"


async def test_a_deadline_counts_from_when_the_job_is_due_and_binds_its_later_attempts(
    engine: AsyncEngine, sessions: Sessions, work: Work
) -> None:
    moment = datetime.now(UTC) + timedelta(hours=2)
    async with sessions.begin() as session:
        handles = [
            await JOB.options(delay=3600).enqueue(session),
            await JOB.options(delay=3600, expires=timedelta(seconds=5)).enqueue(session),
            await JOB.options(delay=3600, expires=moment).enqueue(session),
        ]

    rows = [await row(engine, handle.id) for handle in handles]
    waits = [(one.expires_at - one.run_at).total_seconds() for one in rows[:2]]
    assert waits == [60, 5]
    assert rows[2].expires_at == moment


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"priority": 10}, "priority must be a whole number from 0 .first. to 9, not 10"),
        ({"priority": True}, "not True"),
        ({"expires": 0}, "expires must be more than 0 seconds"),
        ({"expires": -1}, "expires must be between 0 seconds and 36,500 days, not -1"),
        ({"expires": datetime(2050, 1, 1)}, "expires needs a time zone"),
        ({"expires": datetime.now(UTC) - timedelta(1)}, "must lie after the moment the job is due"),
        ({"delay": 7200, "expires": datetime.now(UTC) + timedelta(hours=1)}, "must lie after the moment"),
    ],
)
def test_what_cannot_be_a_priority_or_a_deadline_is_refused(options: Any, said: str) -> None:
    with pytest.raises(ArgumentsInvalid, match=said):
        call_by_name("other.job", {}, **options)


@pytest.mark.parametrize("options", [{"priority": -1}, {"priority": "5"}, {"expires": 0}, {"expires": "soon"}])
def test_what_cannot_be_a_definitions_priority_or_deadline_is_refused(options: Any) -> None:
    with pytest.raises(DefinitionError, match=next(iter(options))):
        JobFunction(snoozes_once, name=NAME, **options)
