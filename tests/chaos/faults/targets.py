"""Measured promises: each of these sets one scene, and returns the figures that stand in docs/reliability.md."""

from __future__ import annotations

import asyncio
import signal
import time
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker

from tests.chaos import jobs, looks
from tests.chaos.faults import Measured, fault
from tests.chaos.stage import Stage
from worker.flow.cancel import cancel

WAITING = 100_000
CANCELS = 20
KILLS = 12
KERNELS_NOTICE = 10.0
"""After so many seconds both ends' kernels give up a connection (`worker.db.engine`); what is sent to a proxy always arrives."""
_FINAL = "('succeeded', 'failed', 'cancelled')"


@fault()
async def flush_of_100_000(stage: Stage) -> Measured:
    """Redis loses everything while 100,000 jobs wait there."""
    stage.load(0)
    begun = time.monotonic()
    for _ in range(WAITING // 10_000):
        left = max(1.0, 29.0 - (time.monotonic() - begun))  # all due at one moment, within reconcile's horizon
        await stage.place(*[jobs.noop.options(delay=left).call()] * 10_000)
    took = time.monotonic() - begun
    known = await looks.count_of_hints(stage.redis)
    await stage.redis.flushall()
    stage.wiped()
    flushed = time.monotonic()
    await stage.until(lambda: looks.knows_hints(stage.redis, known), "all are published again", 60)
    again = time.monotonic() - flushed
    stage.say(f"  {known:,} hints; all published again after {again:.1f} s")
    await stage.until(lambda: _unfinished_at_most(stage, 1_000), "they have run", 300)
    return {"waiting": WAITING, "hints_when_wiped": known, "enqueue_s": took, "published_again_s": again}


@fault()
async def kills_at_half_load(stage: Stage) -> Measured:
    """A random worker is killed every lease and replaced at once, at half the load that all can carry without."""
    lease = stage.pace.lease
    usual = stage.rate
    stage.load(10_000)  # more than they can do: the producers are held back where too much waits
    await asyncio.sleep(lease)
    capacity = await _ended_in(stage, 2 * lease) / (2 * lease)
    stage.load(capacity / 2)
    await stage.until(lambda: _unfinished_at_most(stage, round(capacity)), "the backlog is gone", 120)
    begun = time.time()
    for _ in range(KILLS):
        await stage.kill(stage.any_worker())
        process = stage.start_worker()
        await asyncio.sleep(lease)
        await stage.begun(process)
    ended, placed = [
        (await _numbers(stage, query, since=begun))[0]
        for query in (
            f"SELECT count(*) FROM history WHERE became IN {_FINAL} AND at > to_timestamp(:since)",
            "SELECT count(*) FROM history WHERE was IS NULL AND at > to_timestamp(:since)",
        )
    ]
    stage.load(usual)
    rates = {"capacity_per_s": round(capacity, 1), "placed_per_s": round(placed / (time.time() - begun), 1)}
    return {"kills": KILLS, **rates, "placed": placed, "ended": ended, "completion": round(ended / placed, 3)}


async def _ended_in(stage: Stage, seconds: float) -> int:
    query = f"SELECT count(*) FROM history WHERE became IN {_FINAL}"
    before = await _numbers(stage, query)
    await asyncio.sleep(seconds)
    return (await _numbers(stage, query))[0] - before[0]


@fault()
async def long_job(stage: Stage) -> Measured:
    """Jobs of thirty leases: none may be taken for dead."""
    ids = await stage.place(*[jobs.late.call(30 * stage.pace.lease)] * 10)
    await stage.until(lambda: looks.have_ended(stage.engine, ids), "they have ended", 40 * stage.pace.lease + 30)
    attempts = await _numbers(stage, "SELECT attempt FROM exarq.job WHERE id = ANY(:ids)", ids=ids)
    return {"jobs": len(ids), "leases": 30, "attempts_more_than_one": sum(attempt > 1 for attempt in attempts)}


@fault()
async def stops(stage: Stage) -> Measured:
    """SIGTERM to every worker under load, one of them with a blocked loop, after each time new ones."""
    grace = stage.pace.grace
    late: list[float] = []
    blocked_late: list[float] = []
    for blocked in (False, True, False, True):
        victims, blocker = list(stage.workers), None
        if blocked:
            (job,) = await stage.place(jobs.blocks.call("python", 3 * grace))
            await stage.until(partial(looks.has_begun, stage.engine, job), "the blocking job begins")
            holder = await looks.holder(stage.engine, job)
            blocker = next(process for process in victims if process.worker_id == holder)
        await stage.place(*[jobs.late.call(0.5 * grace)] * 20, *[jobs.late.call(3 * grace)] * 5)
        await asyncio.sleep(0.5)
        took = await asyncio.gather(*(_stop(stage, process, forced=process is blocker) for process in victims))
        for process, seconds in zip(victims, took, strict=True):
            (blocked_late if process is blocker else late).append(round(seconds - grace, 2))
        await stage.begun(*(stage.start_worker() for _ in victims))
    query = "SELECT failures + crashes FROM exarq.job WHERE name IN ('chaos.late', 'chaos.blocks', 'chaos.noop')"
    counted = sum(await _numbers(stage, query))
    return {
        "grace_s": grace,
        "exit_after_grace_s": late,
        "blocked_exit_after_grace_s": blocked_late,
        "counted": counted,
    }


async def _stop(stage: Stage, process: Any, *, forced: bool) -> float:
    begun = time.monotonic()
    process.wanted = False
    process.send(signal.SIGTERM)
    code = await process.ended(stage.pace.grace + 30)
    took = time.monotonic() - begun
    assert code in ({0, 1} if forced else {0}), f"{process.name} ended with {code}"
    stage.leave(process)
    return took


@fault()
async def cancels(stage: Stage) -> Measured:
    """Somebody cancels a job that waits for a query of a minute."""
    took, gone = [], []
    sessions = async_sessionmaker(stage.engine, expire_on_commit=False, info=stage.publisher.info)
    for _ in range(CANCELS):
        (job,) = await stage.place(jobs.queries.call(60))
        await stage.until(partial(_queries, stage, job), "its query runs")
        stage.asked_to_cancel(job)
        begun = time.monotonic()
        async with sessions.begin() as session:
            outcome = await cancel(session, job)
        assert outcome.outcome == "requested", outcome
        await stage.until(partial(looks.have_ended, stage.engine, [job]), "it has ended", 30)
        took.append(round(time.monotonic() - begun, 3))
        gone.append(not await _queries(stage, job))
    return {"cancelled_s": took, "statements_left": gone.count(False)}


async def _queries(stage: Stage, job: UUID) -> bool:
    query = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND query LIKE :job AND state = 'active'"
    return bool(await _numbers(stage, query, job=f"%{job}%"))


@fault()
async def zombie(stage: Stage) -> Measured:
    """A worker stands still with open transactions, as behind a cable that was cut: its locks must go."""
    await stage.place(*[jobs.slow.call(4 * stage.pace.lease)] * 30)
    await asyncio.sleep(stage.pace.lease / 3)
    process = stage.any_worker()
    await stage.until(lambda: _backends(stage, process.worker_id, "idle in transaction"), "it is in transactions")
    held = await _backends(stage, process.worker_id, "idle in transaction")
    stage.strike(process, signal.SIGSTOP)
    begun, worker_id = time.monotonic(), process.worker_id
    await stage.until(
        lambda: _none(_backends(stage, worker_id, "%")), "its backends are gone", 5 * stage.pace.lease + 30
    )
    gone = time.monotonic() - begun
    process.send(signal.SIGCONT)
    return {"transactions_held": held, "locks_gone_s": round(gone, 2)}


@fault()
async def half_open(stage: Stage) -> Measured:
    """All connections fall silent at once, to both servers; new ones work: how soon do the workers beat and work again?"""
    stage.excuse_all()
    before = {row[0]: row[1] for row in await looks.beats(stage.engine)}
    stage.to_postgres.half_open()
    stage.to_redis.half_open()
    begun = time.monotonic()
    noticed: dict[Any, float] = {}

    async def all_beat() -> bool:
        for worker_id, beat in await looks.beats(stage.engine):
            if beat != before.get(worker_id):
                noticed.setdefault(worker_id, round(time.monotonic() - begun, 2))
        return len(noticed) >= len(before)

    async def notice() -> None:
        await asyncio.sleep(KERNELS_NOTICE)
        stage.to_postgres.end_half_open()
        stage.to_redis.end_half_open()

    noticing = asyncio.create_task(notice())
    (job,) = await stage.place(jobs.one.call())
    await stage.until(all_beat, "every worker beats again", 6 * stage.pace.lease + 30)
    await stage.until(lambda: looks.have_ended(stage.engine, [job]), "a job of now has run", 6 * stage.pace.lease + 30)
    job_ran = time.monotonic() - begun
    await noticing
    return {"beat_again_s": sorted(noticed.values()), "job_ran_s": round(job_ran, 2)}


async def _none(found: Any) -> bool:
    return not await found


async def _backends(stage: Stage, worker_id: UUID | None, state: str) -> int:
    query = "SELECT 1 FROM pg_stat_activity WHERE application_name = :name AND state LIKE :state"
    return len(await _numbers(stage, query, name=f"exarq {worker_id}", state=state))


async def _unfinished_at_most(stage: Stage, number: int) -> bool:
    return await looks.unfinished(stage.engine) <= number


async def _numbers(stage: Stage, query: str, **values: Any) -> list[int]:
    async with stage.engine.connect() as connection:
        return list((await connection.execute(text(query), values)).scalars())
