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
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncTransaction

from tests.db.machine.model import Job, Noted
from tests.db.machine.moves import Move, is_waiting
from tests.support import a_work, hints, payload_ids
from worker.broker.keys import PAYLOAD_PREFIX, queue_key
from worker.core.states import JobState
from worker.db import reads, workers
from worker.db.failures import is_contention
from worker.db.transitions import Held
from worker.flow.availability import Availability
from worker.settings import Settings
from worker.upkeep import reconcile

T = TypeVar("T")

QUEUES = ("default", "night")

_ROWS = """
    SELECT id, queue, state, attempt, failures, crashes, cancel_requested, token, worker_id, run_at, finished_at, error,
        result::text AS result, started_at IS NOT NULL AS started,
        (extract(epoch FROM run_at - clock_timestamp()) / 3600)::float8 AS due_in,
        (extract(epoch FROM first_due_at - clock_timestamp()) / 3600)::float8 AS first_due_in,
        (extract(epoch FROM finished_at - clock_timestamp()) / 3600)::float8 AS finished_in,
        (SELECT jsonb_agg(jsonb_build_array(number, token, worker_id, ending, error, traceback) ORDER BY number)::text
            FROM exarq.attempt WHERE job_id = job.id) AS noted
    FROM exarq.job
"""
_EMPTY = "DELETE FROM exarq.job; DELETE FROM exarq.attempt; DELETE FROM exarq.worker WHERE id <> '{}'"
_LATER = """
    UPDATE exarq.job SET run_at = run_at - $1::interval, first_due_at = first_due_at - $1::interval,
        finished_at = finished_at - $1::interval
"""


@dataclass(frozen=True)
class Row:
    """A job's row in the model's words, and what only the row knows."""

    job: Job
    started: bool
    run_at: datetime
    finished_at: datetime | None


class World:
    """A PostgreSQL and a Redis for the machine: `here` each statement commits by itself, `there` one stays open."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._opened = AsyncExitStack()
        self._transaction: AsyncTransaction | None = None
        self.steps = 0
        self.done: Counter[str] = Counter()

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
            await self.redis.delete(*map(queue_key, QUEUES), *payloads)
        finally:
            await self._opened.aclose()

    async def empty(self) -> None:
        """No job, no worker, no hint, and nothing open."""
        await self.end(commit=False)
        await self._driver.execute(_EMPTY.format(self._work.identity.id))
        await self.redis.delete(*map(queue_key, QUEUES))

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
        sent: asyncio.Future[Any] = asyncio.ensure_future(move.send(self._here))
        try:
            await is_waiting(self._there, self._pid, sent)
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
        found = await reads.beats(self._here)
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

    async def due_hints(self) -> set[tuple[str, UUID]]:
        """The jobs that Redis offers at once or after a lease at the latest, each with its queue."""
        seconds, micros = await self.redis.time()
        latest = (seconds + micros / 1e6 + self._settings.worker.lease.total_seconds()) * 1000
        found = {queue: await hints(self.redis, queue) for queue in QUEUES}
        return {(queue, UUID(raw)) for queue in QUEUES for raw, score in found[queue].items() if score <= latest}

    async def spoil(self, lost: Collection[UUID], late: Collection[UUID]) -> None:
        """Let Redis forget the hints of some jobs, and believe of others that they are due much later."""
        for key in map(queue_key, QUEUES):
            if late:
                await self.redis.zadd(key, {str(job_id): 2e12 for job_id in late}, xx=True)
            if lost:
                await self.redis.zrem(key, *map(str, lost))


def _row(found: Any, now: int) -> Row:
    noted = json.loads(found["noted"] or "[]")
    job = Job(
        queue=found["queue"],
        run_at=now + round(found["due_in"]),
        first_due_at=now + round(found["first_due_in"]),
        state=JobState(found["state"]),
        attempt=found["attempt"],
        failures=found["failures"],
        crashes=found["crashes"],
        cancel_requested=found["cancel_requested"],
        token=found["token"],
        worker=found["worker_id"],
        finished_at=None if found["finished_in"] is None else now + round(found["finished_in"]),
        result=json.loads(found["result"] or "null"),
        error=found["error"],
        noted=tuple(Noted(number, UUID(token), UUID(worker), *rest) for number, token, worker, *rest in noted),
    )
    return Row(job, found["started"], found["run_at"], found["finished_at"])
