"""Pump: claim whenever there is room, run what was claimed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from datetime import timedelta
from functools import partial
from typing import Any, Final

from worker.db import reads
from worker.db.failures import is_transient
from worker.db.send import once
from worker.flow.claim import Claimer
from worker.flow.holdings import Because, Run
from worker.flow.run import run as run_attempt
from worker.flow.work import Work
from worker.observe.events import StepFailed, emit

_BACK_OFF: Final = timedelta(seconds=1)
_MOST_UNSTORED: Final = 1_000
_AFTER_CANCEL: Final = timedelta(milliseconds=500)


class Pump:
    """Keeps a worker's slots full.

    Args:
        work: the worker's parts.
        claimer: where the jobs come from.
        concurrency: how many attempts run at once.
        burst: end when nothing is due and nothing runs.
        stop: no more claims once it is set.

    """

    def __init__(self, work: Work, claimer: Claimer, *, concurrency: int, burst: bool, stop: asyncio.Event) -> None:
        self._work = work
        self._claimer = claimer
        self._concurrency = concurrency
        self._burst = burst
        self._stop = stop
        self._stopped: asyncio.Future[Any]
        self._tasks: set[asyncio.Task[None]] = set()
        self._slot_freed = asyncio.Event()
        self._hurried = asyncio.Event()

    @property
    def running(self) -> int:
        """How many attempts run."""
        return len(self._tasks)

    async def until_stopped(self) -> None:
        """Claim and run until `stop` is set, or in burst mode until there is nothing left."""
        self._stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await self._claim_and_run()
        finally:
            await _cancelled(self._stopped)
            await self._work.claims.close()

    async def _claim_and_run(self) -> None:
        while not self._stop.is_set():
            if self._work.flusher.backlog >= _MOST_UNSTORED:
                await self._until(self._work.flusher.drain())
            room = await self._room()
            if self._stop.is_set():
                return
            try:
                runs = await self._claimer.claim(room) or (await self._claimer.scan(room) if self._burst else [])
                if self._burst and not runs and await self._nothing_left():
                    return
                self._start(runs)
                if runs:
                    await asyncio.sleep(0)  # they begin before the next claim does
                else:
                    await self._wait_for_work()
            except Exception as error:
                if self._burst and not is_transient(error):
                    raise
                emit(StepFailed(step="claim", error=f"{type(error).__name__}: {error}"))
                await self._until(asyncio.sleep(_BACK_OFF.total_seconds()))

    async def finish(self, grace: timedelta) -> None:
        """Let what runs end within `grace`, cancel the rest, store what has ended."""
        if self._tasks:
            hurried = asyncio.ensure_future(self._hurried.wait())
            ended = asyncio.ensure_future(asyncio.wait(self._tasks))
            await asyncio.wait({hurried, ended}, timeout=grace.total_seconds(), return_when=asyncio.FIRST_COMPLETED)
            await _cancelled(hurried, ended)
        for run in self._work.holdings.runs().values():
            run.cancel(Because.STOPPING)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_AFTER_CANCEL.total_seconds())
        try:
            async with asyncio.timeout(_AFTER_CANCEL.total_seconds()):
                await self._work.flusher.drain()
                await self._claimer.drop_claimed()
                await self._work.publisher.flush()
        except TimeoutError:
            emit(StepFailed(step="last flush", error="PostgreSQL or Redis did not answer in time"))

    def hurry(self) -> None:
        """End the grace now: somebody has asked a second time."""
        self._hurried.set()

    async def abandon(self) -> None:
        """End the tasks that neither the grace nor their cancellation has ended; their jobs were given back."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_AFTER_CANCEL.total_seconds())

    def _start(self, runs: Iterable[Run]) -> None:
        loop = asyncio.get_running_loop()
        for run in runs:
            name = f"{run.claimed.name} {run.claimed.held.job_id}"
            run.task = loop.create_task(run_attempt(self._work, run), name=name)
            self._tasks.add(run.task)
            run.task.add_done_callback(partial(self._ended, run))

    def _ended(self, run: Run, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._slot_freed.set()
        if task.cancelled() or task.exception() is not None:
            # Not the job's error, for that has become an outcome: give the row to the next beat.
            self._work.holdings.let_go(run.claimed.held)
            error = "cancelled" if task.cancelled() else repr(task.exception())
            emit(StepFailed(step=f"run {run.claimed.name}", error=error))

    async def _nothing_left(self) -> bool:
        if self._tasks:
            return False
        await self._until(self._work.flusher.drain())
        queues = self._work.settings.worker.queues
        return not await once(self._work.processor, lambda connection: reads.something_is_due(connection, queues))

    async def _wait_for_work(self) -> None:
        if self._burst and self._tasks:  # the last of these to end may leave nothing to do
            self._slot_freed.clear()
            await self._until(self._slot_freed.wait(), self._claimer.wait())
        else:
            await self._until(self._claimer.wait())

    async def _room(self) -> int:
        """How many slots are free, as soon as one is; a busy loop makes a claim take long, and then it is more."""
        if not self._free:
            self._slot_freed.clear()
            await self._until(self._slot_freed.wait())
        return self._free

    @property
    def _free(self) -> int:
        return self._concurrency - len(self._tasks)

    async def _until(self, *awaited: Coroutine[Any, Any, Any]) -> None:
        """Wait for the first of these, or until `stop` is set."""
        waiters = [asyncio.ensure_future(one) for one in awaited]
        try:
            await asyncio.wait({*waiters, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
            for waiter in waiters:
                if waiter.done():
                    waiter.result()
        finally:
            await _cancelled(*waiters)


async def _cancelled(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
