"""Looks at the system from outside, past all proxies, while it runs and when it is at rest."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from arq.connections import ArqRedis
from arq.constants import result_key_prefix
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.chaos.checker import Offence
from tests.chaos.jobs import KINDS, PREFIX
from worker.broker.keys import PAYLOAD_PREFIX, lane_key, wake_key
from worker.core.names import DEFAULT_QUEUE
from worker.core.priority import PRIORITIES

PLACE: Final = text("INSERT INTO placed (job_id) SELECT unnest(CAST(:jobs AS uuid[]))")

LANES: Final = [lane_key(DEFAULT_QUEUE, priority) for priority in PRIORITIES]

_UNFINISHED: Final = text("SELECT count(*) FROM exarq.job WHERE state IN ('queued', 'running')")
_LAST_MOVE: Final = text("SELECT coalesce(max(n), 0) FROM history")

# One statement sees one moment. Of the jobs that have moved since the last look: a result if and only if its effects.
_KINDS: Final = ", ".join(f"('{PREFIX}{name}', {kind.parts}, {kind.own})" for name, kind in KINDS.items())
_OUT_OF_STEP: Final = text(f"""
SELECT job.id, job.state, count(effect.job_id) FROM exarq.job
JOIN (VALUES {_KINDS}) AS kind (name, parts, own) USING (name)
LEFT JOIN effect ON effect.job_id = job.id
WHERE job.id IN (SELECT job_id FROM history WHERE n > :since) AND NOT (own AND job.state <> 'succeeded')
GROUP BY job.id, job.state, kind.parts
HAVING count(effect.job_id) <> CASE WHEN job.state = 'succeeded' THEN kind.parts ELSE 0 END
""")

_WAITS: Final = text("""
SELECT id FROM exarq.job WHERE state = 'queued' AND run_at < clock_timestamp() + interval '20 seconds'
AND (SELECT max(at) FROM history WHERE job_id = id) < clock_timestamp() - interval '700 milliseconds'
""")

_IDLE: Final = text("""
SELECT pid, application_name, left(query, 100) FROM pg_stat_activity
WHERE state LIKE 'idle in transaction%' AND application_name LIKE 'exarq%'
""")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far things are: while it changes, something moves."""

    unfinished: int
    last_move: int
    hints: int


async def unfinished(engine: AsyncEngine) -> int:
    """How many jobs wait or run."""
    async with engine.connect() as connection:
        return int((await connection.execute(_UNFINISHED)).scalar_one())


async def done_and_waiting(engine: AsyncEngine) -> tuple[int, int]:
    """How many jobs have ended, and how many have not."""
    async with engine.connect() as connection:
        total = int((await connection.execute(text("SELECT count(*) FROM exarq.job"))).scalar_one())
        waiting = int((await connection.execute(_UNFINISHED)).scalar_one())
    return total - waiting, waiting


async def progress(engine: AsyncEngine, redis: ArqRedis) -> Progress:
    """How far things are."""
    async with engine.connect() as connection:
        waiting = int((await connection.execute(_UNFINISHED)).scalar_one())
        last_move = int((await connection.execute(_LAST_MOVE)).scalar_one())
    return Progress(waiting, last_move, await count_of_hints(redis))


async def count_of_hints(redis: ArqRedis) -> int:
    """How many hints are in Redis."""
    return sum([int(await redis.zcard(lane)) for lane in LANES])


async def knows_hints(redis: ArqRedis, number: int) -> bool:
    """Whether at least so many hints are in Redis."""
    return await count_of_hints(redis) >= number


async def holder(engine: AsyncEngine, job_id: UUID) -> UUID | None:
    """The worker under whose id this job runs, or ran last."""
    async with engine.connect() as connection:
        found = text("SELECT worker_id FROM exarq.job WHERE id = :id")
        return (await connection.execute(found, {"id": job_id})).scalar_one_or_none()


async def holders(engine: AsyncEngine, ids: list[UUID]) -> set[UUID]:
    """The workers that run one of these jobs."""
    async with engine.connect() as connection:
        found = text("SELECT DISTINCT worker_id FROM exarq.job WHERE state = 'running' AND id = ANY(:ids)")
        return set((await connection.execute(found, {"ids": ids})).scalars())


async def beats(engine: AsyncEngine) -> list[tuple[UUID, int]]:
    """Every worker with its beat."""
    async with engine.connect() as connection:
        rows = await connection.execute(text("SELECT id, beat FROM exarq.worker"))
        return [(worker_id, beat) for worker_id, beat in rows]


_ENDED: Final = text(
    "SELECT count(*) FROM exarq.job WHERE id = ANY(:ids) AND state IN ('succeeded', 'failed', 'cancelled')"
)


async def have_ended(engine: AsyncEngine, ids: list[UUID]) -> bool:
    """Whether all of these have ended."""
    async with engine.connect() as connection:
        return bool((await connection.execute(_ENDED, {"ids": ids})).scalar_one() == len(ids))


async def has_begun(engine: AsyncEngine, job_id: UUID) -> bool:
    """Whether a worker has claimed this job at least once."""
    async with engine.connect() as connection:
        found = text("SELECT attempt > 0 FROM exarq.job WHERE id = :id")
        return bool((await connection.execute(found, {"id": job_id})).scalar_one())


async def some_run(engine: AsyncEngine, at_least: int) -> bool:
    """Whether so many jobs run."""
    async with engine.connect() as connection:
        found = text("SELECT count(*) FROM exarq.job WHERE state = 'running'")
        return int((await connection.execute(found)).scalar_one()) >= at_least


async def out_of_step(engine: AsyncEngine, since: int) -> tuple[int, list[tuple[str, str]]]:
    """The jobs whose result is visible without their effects or the reverse, among those that moved after `since`."""
    async with engine.connect() as connection:
        now = int((await connection.execute(_LAST_MOVE)).scalar_one())
        rows = (await connection.execute(_OUT_OF_STEP, {"since": since})).all()
    # A smaller number may become visible later than a larger one: what was in flight is looked at again.
    return max(0, now - 1_000), [
        (str(job_id), f"seen {state} with {effects} effects") for job_id, state, effects in rows
    ]


async def missing_hints(engine: AsyncEngine, redis: ArqRedis) -> list[UUID]:
    """The jobs that waited before and after a look at Redis, which did not know them."""
    before = await _waiting(engine)
    if not before:
        return []
    of_lanes = [await redis.zmscore(lane, [str(job_id) for job_id in before]) for lane in LANES]
    known = [any(score is not None for score in scores) for scores in zip(*of_lanes, strict=True)]
    after = await _waiting(engine)
    return [job_id for job_id, there in zip(before, known, strict=True) if not there and job_id in after]


async def _waiting(engine: AsyncEngine) -> list[UUID]:
    async with engine.connect() as connection:
        return list((await connection.execute(_WAITS)).scalars())


async def idle_in_transaction(engine: AsyncEngine) -> list[Offence]:
    """The workers' connections that stay idle in a transaction although nothing runs."""
    always: dict[int, Any] = {}
    for look in range(4):
        async with engine.connect() as connection:
            found = {row.pid: row for row in await connection.execute(_IDLE)}
        always = found if look == 0 else {pid: row for pid, row in always.items() if pid in found}
        await asyncio.sleep(0.3)
    return [Offence("idle_in_transaction", row.application_name, row.left) for row in always.values()]


async def left_running(engine: AsyncEngine) -> list[Offence]:
    """The rows that still run although nothing moves any more."""
    async with engine.connect() as connection:
        rows = await connection.execute(text("SELECT id, worker_id FROM exarq.job WHERE state = 'running'"))
        return [Offence("left_running", str(job_id), f"under {worker_id}") for job_id, worker_id in rows]


async def orphan_keys(engine: AsyncEngine, redis: ArqRedis, evicted: Set[str]) -> list[Offence]:
    """What is left in Redis although no job waits; the payload beside an evicted hint goes when it expires."""
    async with engine.connect() as connection:
        waiting = {
            str(id_)
            for id_ in (await connection.execute(text("SELECT id FROM exarq.job WHERE state = 'queued'"))).scalars()
        }
    prefix = PAYLOAD_PREFIX.encode()
    hints = {raw.decode() for lane in LANES for raw in await redis.zrange(lane, 0, -1)}
    keys = {key async for key in redis.scan_iter(count=1000)}
    payloads = {key.removeprefix(prefix).decode() for key in keys if key.startswith(prefix)} - evicted
    known = {key.encode() for key in (*LANES, wake_key(DEFAULT_QUEUE))}
    # A result stays for an hour, as ARQ keeps it for its clients.
    others = {key for key in keys - known if not key.startswith((prefix, result_key_prefix.encode()))}
    return [
        *(Offence("orphan_keys", str(key), "nobody knows whose it is") for key in sorted(others)),
        *(Offence("orphan_keys", hint, "a hint of a job that does not wait") for hint in sorted(hints - waiting)),
        *(Offence("orphan_keys", job, "a payload of a job that does not wait") for job in sorted(payloads - waiting)),
    ]
