"""The servers as the machine uses them: one event loop and two connections, kept across all its examples."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Collection, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self, TypeVar
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncTransaction

from tests.db.machine.keyed import EXPIRED
from tests.db.machine.model import Job, Noted
from tests.db.machine.moves import Move, is_waiting
from tests.support import a_work, hints, payload_ids
from worker.broker.keys import PAYLOAD_PREFIX, lane_key
from worker.core.priority import DEFAULT_PRIORITY, STEP
from worker.core.states import JobState
from worker.db import reads, workers
from worker.db.failures import is_contention
from worker.db.transitions import Held
from worker.flow.availability import Availability
from worker.settings import Settings
from worker.upkeep import reconcile

T = TypeVar("T")

QUEUES = ("default", "night")
PRIORITIES = (0, DEFAULT_PRIORITY)
LANES = {(queue, priority): lane_key(queue, priority) for queue in QUEUES for priority in PRIORITIES}

_ROWS = """
    SELECT id, queue, args ->> 'says' AS says, priority, unique_key, unique_for, state, attempt, failures, crashes, cancel_requested, token, worker_id, run_at, finished_at, error,
        result::text AS result, started_at IS NOT NULL AS started,
        (extract(epoch FROM run_at - clock_timestamp()) / 3600)::float8 AS due_in,
        (extract(epoch FROM first_due_at - clock_timestamp()) / 3600)::float8 AS first_due_in,
        (extract(epoch FROM started_at - clock_timestamp()) / 3600)::float8 AS started_in,
        (extract(epoch FROM expires_at - clock_timestamp()) / 3600)::float8 AS expires_in,
        (extract(epoch FROM unique_until - clock_timestamp()) / 3600)::float8 AS unique_in,
        (extract(epoch FROM finished_at - clock_timestamp()) / 3600)::float8 AS finished_in,
        (SELECT jsonb_agg(jsonb_build_array(number, token, worker_id, ending, error, traceback) ORDER BY number)::text
            FROM exarq.attempt WHERE job_id = job.id) AS noted
    FROM exarq.job
"""
_EMPTY = "DELETE FROM exarq.job; DELETE FROM exarq.attempt; DELETE FROM exarq.worker WHERE id <> '{}'"
_LATER = """
    UPDATE exarq.job SET run_at = run_at - $1::interval, first_due_at = first_due_at - $1::interval,
        finished_at = finished_at - $1::interval, started_at = started_at - $1::interval,
        expires_at = expires_at - $1::interval, unique_until = unique_until - $1::interval
"""


@dataclass(frozen=True)
class Row:
    """A job's row in the model's words, and what only the row knows."""

    job: Job
    started: bool
    run_at: datetime
    finished_at: datetime | None

    @property
    def rank(self) -> datetime:
        """When its turn is, among those that are due."""
        return self.run_at + (self.job.priority - DEFAULT_PRIORITY) * STEP


class World:
    """A PostgreSQL and a Redis for the machine: `here` each statement commits by itself, `there` one stays open."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._opened = AsyncExitStack()
        self._transaction: AsyncTransaction | None = None
        self.steps = 0
        self.done: Counter[str] = Counter()
        self._drawn = 0

    def __enter__(self) -> Self:
        self.run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.run(self._close())
        finally:
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do this on the one loop."""
        return self._loop.run_until_complete(work)

    async def _open(self) -> None:
        self._work = await self._opened.enter_async_context(a_work(self._settings))
        self._engine: AsyncEngine = self._work.processor
        self.redis = self._work.context["redis"]
        self._availability = Availability(self.redis)
        plain = await self._opened.enter_async_context(self._engine.connect())
        self._here = await plain.execution_options(isolation_level="AUTOCOMMIT")
        self._there: AsyncConnection = await self._opened.enter_async_context(self._engine.connect())
        driver: Any = (await self._here.get_raw_connection()).driver_connection
        self._driver = driver
        self._pid: int = await self._driver.fetchval("SELECT pg_backend_pid()")

    async def _close(self) -> None:
        try:
            await self.empty()
            payloads = [PAYLOAD_PREFIX + job_id for job_id in await payload_ids(self.redis)]
            await self.redis.delete(*LANES.values(), *payloads)
        finally:
            await self._opened.aclose()

    async def empty(self) -> None:
        """No job, no worker, no hint, and nothing open."""
        self._drawn = 0
        await self.end(commit=False)
        await self._driver.execute(_EMPTY.format(self._work.identity.id))
        await self.redis.delete(*LANES.values())

    def draw(self) -> UUID:
        """An id whose order says nothing about when it was drawn, and which is the same at every repetition."""
        self._drawn += 1
        return UUID(int=self._drawn * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128)

    # ── moves ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def send(self, move: Move) -> Any:
        """Make the move and commit it."""
        if not move.in_transaction:
            return await move.send(self._here)
        async with self._engine.begin() as connection:
            return await move.send(connection)

    async def send_there(self, move: Move) -> Any:
        """Make the move in a transaction that stays open."""
        assert self._transaction is None
        self._transaction = await self._there.begin()
        return await move.send(self._there)

    async def end(self, *, commit: bool) -> None:
        """End the transaction that is open."""
        if self._transaction is not None:
            transaction, self._transaction = self._transaction, None
            await (transaction.commit() if commit else transaction.rollback())

    async def send_in_vain(self, move: Move) -> None:
        """Make a move that fails because of the transaction that is open."""
        with pytest.raises(DBAPIError) as refused:
            await move.send(self._here)
        assert is_contention(refused.value)

    async def send_and_end(self, move: Move, *, commit: bool) -> Any:
        """Make a move that has to wait for the transaction that is open, and end that."""
        async with AsyncExitStack() as opened:
            connection, pid = self._here, self._pid
            if move.in_transaction:
                connection = await opened.enter_async_context(self._engine.begin())
                pid = await connection.scalar(text("SELECT pg_backend_pid()"))
            return await self._send_on(connection, pid, move, commit=commit)

    async def _send_on(self, connection: AsyncConnection, pid: int, move: Move, *, commit: bool) -> Any:
        sent: asyncio.Future[Any] = asyncio.ensure_future(move.send(connection))
        try:
            await is_waiting(self._there, pid, sent)
        except BaseException:
            commit = False
            raise
        finally:
            await self.end(commit=commit)
            await asyncio.wait([sent])
        return await sent

    async def register(self, worker: UUID) -> None:
        """A worker begins to beat."""
        await workers.register(self._here, worker, queues=QUEUES, concurrency=1)

    async def announce_stop(self, worker: UUID) -> None:
        """A worker says that it stops."""
        await workers.announce_stop(self._here, worker)

    async def hours_pass(self, hours: int) -> None:
        """Everything that was written was written so much earlier."""
        await self._driver.execute(_LATER, timedelta(hours=hours))

    # ── what is there ───────────────────────────────────────────────────────────────────────────────────────────────

    async def rows(self, now: int) -> dict[UUID, Row]:
        """All rows as of this hour."""
        return {found["id"]: _row(found, now) for found in await self._driver.fetch(_ROWS)}

    async def beats(self) -> dict[UUID, int | None]:
        """Whom a rescuer looks at, but for the worker whose parts the machine borrows."""
        found = (await reads.sweep(self._here, horizon=timedelta(0), soon=timedelta(0))).beats
        del found[self._work.identity.id]
        return found

    async def running_under(self, worker: UUID) -> dict[Held, bool]:
        """What a beat of this worker finds."""
        return await reads.running_under(self._here, worker)

    async def attempts_without_a_job(self) -> int:
        """How many attempts a deleted job has left behind."""
        query = "SELECT count(*) FROM exarq.attempt WHERE job_id NOT IN (SELECT id FROM exarq.job)"
        return int(await self._driver.fetchval(query))

    async def walk(self) -> None:
        """Reconcile until its walk has gone through all that waits."""
        again = "UPDATE exarq.upkeep SET due_at = clock_timestamp() WHERE step = 'reconcile' RETURNING after_id"
        while True:
            await reconcile.reconcile(self._work, self.redis, self._availability)
            if await self._driver.fetchval(again) is None:
                return

    async def due_hints(self) -> set[tuple[str, int, UUID]]:
        """The jobs that Redis offers at once or after a lease at the latest, each with its queue and priority."""
        seconds, micros = await self.redis.time()
        latest = (seconds + micros / 1e6 + self._settings.worker.lease.total_seconds()) * 1000
        found = {lane: await hints(self.redis, *lane) for lane in LANES}
        return {(*lane, UUID(raw)) for lane in LANES for raw, score in found[lane].items() if score <= latest}

    async def spoil(self, lost: Collection[UUID], late: Collection[UUID]) -> None:
        """Let Redis forget the hints of some jobs, and believe of others that they are due much later."""
        for key in LANES.values():
            if late:
                await self.redis.zadd(key, {str(job_id): 2e12 for job_id in late}, xx=True)
            if lost:
                await self.redis.zrem(key, *map(str, lost))


def _hour(hours: float | None, now: int) -> int | None:
    return None if hours is None else now + round(hours)


def _row(found: Any, now: int) -> Row:
    noted = json.loads(found["noted"] or "[]")
    job = Job(
        queue=found["queue"],
        run_at=now + round(found["due_in"]),
        first_due_at=now + round(found["first_due_in"]),
        says=found["says"],
        priority=found["priority"],
        expires=_hour(found["expires_in"], now),
        key=found["unique_key"],
        scope=found["unique_for"],
        until=_hour(found["unique_in"], now),
        started_at=_hour(found["started_in"], now),
        state=JobState(found["state"]),
        attempt=found["attempt"],
        failures=found["failures"],
        crashes=found["crashes"],
        cancel_requested=found["cancel_requested"],
        token=found["token"],
        worker=found["worker_id"],
        finished_at=_hour(found["finished_in"], now),
        result=json.loads(found["result"] or "null"),
        error=EXPIRED if str(found["error"]).startswith(EXPIRED) else found["error"],
        noted=tuple(Noted(number, UUID(token), UUID(worker), *rest) for number, token, worker, *rest in noted),
    )
    return Row(job, found["started"], found["run_at"], found["finished_at"])
