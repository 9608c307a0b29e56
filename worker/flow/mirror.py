"""Mirror: what plain ARQ's clients look at in Redis says how the rows of adopted jobs stand.

PostgreSQL is the truth here, too: each word is made from the row, so it may be said again, late or by another worker.
An adopted job's ARQ id stays in the queue until the job has ended, and comes up again a lease after the last word: then
a claim finds it, and what nobody has said yet is said.
"""

from __future__ import annotations

import asyncio
import builtins
import json
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID

from arq.connections import ArqRedis
from arq.worker import JobExecutionFailed
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.broker import stock
from worker.broker.connection import UNREACHABLE
from worker.broker.hints import ms_of
from worker.broker.keys import queue_key
from worker.broker.payloads import Enqueued, Payloads
from worker.broker.stock import RESULT_KEPT, Said, Seen
from worker.core.outcome import EXPIRED
from worker.core.states import JobState
from worker.db import adopted, transitions
from worker.db.adopted import Adopted
from worker.db.ids import is_adopted
from worker.db.send import once
from worker.flow.cancel import message_of
from worker.flow.holdings import Because, Run
from worker.flow.publish import Publishable
from worker.observe.events import StepFailed, emit

_LOOK_EVERY: Final = timedelta(milliseconds=500)
_SILENT_LEASES: Final = 3
_REMEMBERED: Final = 1_000
_CLOSE_LIMIT: Final = timedelta(seconds=2)


class Mirror:
    """Says in Redis how adopted jobs stand, and hears there which of them somebody wants to abort.

    Args:
        redis: the client; without one, nothing is said.
        processor: the engine for Exarq's own statements.
        payloads: reads what was enqueued, writes results.
        lease: after how long a job's id comes up in the queue again.
        publish: tells the workers of a cancel.

    """

    def __init__(
        self,
        redis: ArqRedis | None,
        processor: AsyncEngine,
        payloads: Payloads,
        lease: timedelta,
        publish: Callable[[Iterable[Publishable]], None],
    ) -> None:
        self._redis = redis
        self._processor = processor
        self.payloads = payloads
        self._lease = lease
        self._publish = publish
        self._unsaid: dict[UUID, Run | None] = {}
        self._saying: asyncio.Task[None] | None = None
        self._running: dict[UUID, tuple[Adopted, Run]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._ends_said: dict[UUID, int] = {}  # with their attempts

    def began(self, run: Run) -> None:
        """An attempt has begun; says so soon if the job is an adopted one."""
        if is_adopted(run.claimed.held.job_id):
            self._soon(run.claimed.held.job_id, run)

    def moved(self, job_id: UUID) -> None:
        """A job's move is committed; says so soon if it is an adopted one."""
        if is_adopted(job_id):
            self._soon(job_id, None)

    async def say(self, jobs: Sequence[Adopted], seen: Iterable[Seen]) -> None:
        """Say how these stand, unless what was seen there is a later enqueue under the same id."""
        assert self._redis is not None
        there = {one.arq_id: one for one in seen}
        said = [self._said(job, there[job.arq_id]) for job in jobs]
        words = [one for one in said if one is not None]
        await stock.mirror(self._redis, words, silence=self._lease * _SILENT_LEASES)
        self._ends_said.update((job.id, job.attempt) for job in jobs if job.has_ended)
        while len(self._ends_said) > _REMEMBERED:
            del self._ends_said[next(iter(self._ends_said))]

    async def abort(self, job: Adopted) -> None:
        """Cancel a job as `Job.abort()` asks, wherever it waits or runs."""

        async def ask(connection: Any) -> transitions.CancelRequest | None:
            asked: transitions.CancelRequest | None = await connection.run_sync(
                transitions.request_cancel, job.id, Because.CANCEL_REQUESTED
            )
            return asked

        request = await once(self._processor, ask)
        if request is not None and (message := message_of(job.id, request)) is not None:
            self._publish([message])
        if job.id in self._running:
            self._running[job.id][1].cancel(Because.CANCEL_REQUESTED)
        self.moved(job.id)

    async def flush(self) -> None:
        """Return when all that moved so far was said, or could not be."""
        while self._saying is not None and not self._saying.done():
            await asyncio.wait([self._saying])

    async def close(self) -> None:
        """Say what is unsaid, for a moment; the rest is said when its id comes up in the queue."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._saying is not None:
            await asyncio.wait([self._saying], timeout=_CLOSE_LIMIT.total_seconds())
            self._saying.cancel()
            await asyncio.wait([self._saying])

    def _soon(self, job_id: UUID, run: Run | None) -> None:
        if self._redis is None:
            return
        self._unsaid[job_id] = run
        if self._saying is None or self._saying.done():
            self._saying = asyncio.get_running_loop().create_task(self._say_all(self._redis), name="exarq mirror")

    async def _say_all(self, redis: ArqRedis) -> None:
        while self._unsaid:
            batch, self._unsaid = self._unsaid, {}
            try:
                jobs = await once(self._processor, partial(adopted.by_id, ids=list(batch)))
                seen = await stock.look(redis, [job.arq_id for job in jobs])
                await self.say(jobs, seen)
            except Exception as error:
                emit(StepFailed(step="mirror", error=f"{type(error).__name__}: {error}"))
                continue
            for job in jobs:
                self._watch(redis, job, batch[job.id])

    def _watch(self, redis: ArqRedis, job: Adopted, run: Run | None) -> None:
        if run is None or job.state is not JobState.RUNNING:
            self._running.pop(job.id, None)
            return
        self._running[job.id] = job, run
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._hear_aborts(redis), name="exarq aborts")

    async def _hear_aborts(self, redis: ArqRedis) -> None:
        """While adopted jobs run here, look twice a second whether somebody wants one of them to end, as ARQ does.

        That they run is said anew before their ids come up: Redis may have been wiped, and all workers may be full.
        """
        said = time.monotonic()
        while self._running:
            by_arq_id = {job.arq_id: job for job, _ in self._running.values()}
            try:
                for arq_id in await stock.aborted(redis, list(by_arq_id)):
                    await self.abort(by_arq_id[arq_id])
            except Exception as error:
                if not isinstance(error, UNREACHABLE):
                    emit(StepFailed(step="abort", error=f"{type(error).__name__}: {error}"))
            await asyncio.sleep(_LOOK_EVERY.total_seconds())
            ended = [id_ for id_, (_, run) in self._running.items() if run.task is not None and run.task.done()]
            for id_ in ended:
                del self._running[id_]
            if time.monotonic() - said > self._lease.total_seconds() / 2:
                said = time.monotonic()
                for id_, (_, run) in self._running.items():
                    self._soon(id_, run)

    def _said(self, job: Adopted, seen: Seen) -> Said | None:
        payload = seen.payload
        enqueued = self.payloads.read(payload) if payload is not None else None
        if enqueued is not None and enqueued.at != job.arq_enqueued:
            return None
        if job.has_ended:
            if payload is None and self._ends_said.get(job.id) == job.attempt:
                # A quick job's beginning and its end are told of one after the other; the result has its arguments.
                return Said(job.arq_id, job.queue, None, "ended")
            known = enqueued if isinstance(enqueued, Enqueued) else None
            result = self.payloads.result(seen.format, **_ended(job, known))
            return Said(job.arq_id, job.queue, payload, "ended", RESULT_KEPT, result)
        if job.state is JobState.RUNNING:
            return Said(job.arq_id, job.queue, payload, "runs", self._lease)
        # What is due has a hint of its own; its id in ARQ need not come up before the next lease.
        again = job.wait if job.wait > timedelta(0) else self._lease
        return Said(job.arq_id, job.queue, payload, "waits", again)


def _ended(job: Adopted, enqueued: Enqueued | None) -> dict[str, Any]:
    """What `arq.jobs.serialize_result` takes."""
    finished = job.finished_at or job.enqueued_at
    return {
        "function": job.name,
        "args": enqueued.args if enqueued else (),
        "kwargs": enqueued.kwargs if enqueued else {},
        "job_try": job.attempt,
        "enqueue_time_ms": job.arq_enqueued if job.arq_enqueued >= 0 else ms_of(job.enqueued_at),
        "success": job.state is JobState.SUCCEEDED,
        "result": _result(job),
        "start_ms": ms_of(job.started_at or finished),
        "finished_ms": ms_of(finished),
        "ref": f"{job.arq_id}:{job.name}",
        "queue_name": queue_key(job.queue),
        "job_id": job.arq_id,
    }


def _result(job: Adopted) -> Any:
    """What the function returned, as JSON has it; else an exception that a client has the class of."""
    if job.state is JobState.SUCCEEDED:
        return json.loads(job.result) if job.result is not None else None
    error = job.error or ""
    if job.state is JobState.CANCELLED and not error.startswith(EXPIRED):
        return CancelledError()
    kind, _, message = error.partition(": ")
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception):
        try:
            return known(message)
        except TypeError:  # as UnicodeDecodeError, which takes more than a message
            pass
    return JobExecutionFailed(error)


def expired(arq_id: str, queue: str, now: datetime) -> dict[str, Any]:
    """The end of a job whose payload was gone before anybody adopted it, in ARQ's own words."""
    at = ms_of(now)
    return {
        "function": "<unknown>",
        "args": (),
        "kwargs": {},
        "job_try": 1,
        "enqueue_time_ms": 0,
        "success": False,
        "result": JobExecutionFailed("job expired"),
        "start_ms": at,
        "finished_ms": at,
        "ref": arq_id,
        "queue_name": queue_key(queue),
        "job_id": arq_id,
    }
