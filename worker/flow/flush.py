"""Flush: the successes of jobs that wrote nothing, many with one statement."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.core.remarks import NOTHING
from worker.core.states import JobState
from worker.db import reads, transitions
from worker.db.send import until_answered
from worker.db.transitions import Held
from worker.flow.holdings import Run
from worker.observe.events import FlushSending, emit

Told = Callable[[Run], None]
Rejected = Callable[[Run, Exception], Awaitable[None]]
_PATIENCE: Final = timedelta(milliseconds=2)
_PATIENCE_WITH_LOCKS: Final = timedelta(milliseconds=50)
_LARGEST_FLUSH: Final = 500
_LARGEST_TEXT: Final = 8 * 1024 * 1024  # of the results in one flush, so that it ends well within its time limit


class Flusher:
    """Collects successes for a moment and stores them together.

    Args:
        processor: the engine for Exarq's own statements.
        stored: told of each run whose success is committed.
        lost: told of each run whose job somebody else holds.
        rejected: told of each run whose result the server refuses, and why.

    """

    def __init__(self, processor: AsyncEngine, *, stored: Told, lost: Told, rejected: Rejected) -> None:
        self._processor = processor
        self._stored = stored
        self._lost = lost
        self._rejected = rejected
        self._waiting: list[tuple[Run, str]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._patience = _PATIENCE
        self._context = contextvars.copy_context()

    def add(self, run: Run, result: str) -> None:
        """Store this success with the next flush; the job stays held until then."""
        self._waiting.append((run, result))
        if self._flushing is None or self._flushing.done():
            # In our own context, for what one job has bound to its log lines is nothing to say of the others.
            self._flushing = self._context.run(asyncio.create_task, self._flush_all(), name="exarq flush")

    @property
    def backlog(self) -> int:
        """How many successes wait to be stored."""
        return len(self._waiting)

    async def drain(self) -> None:
        """Return when everything that was added is stored."""
        while self._flushing is not None and not self._flushing.done():
            await asyncio.wait([self._flushing])

    async def close(self) -> None:
        """End what is still being stored: those jobs stay in the hands of who gives them back."""
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.wait([self._flushing])

    async def _flush_all(self) -> None:
        while self._waiting:
            if len(self._waiting) < _LARGEST_FLUSH:
                await asyncio.sleep(self._patience.total_seconds())
            self._patience = _PATIENCE
            await self._flush(self._next_batch())

    def _next_batch(self) -> list[tuple[Run, str]]:
        room, count = _LARGEST_TEXT, 0
        for _, result in self._waiting[:_LARGEST_FLUSH]:
            room -= len(result)
            if room < 0 and count:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    async def _flush(self, batch: list[tuple[Run, str]]) -> None:
        """Store a batch; one that the server rejects for its data is halved until the guilty one is alone."""
        results = {run.claimed.held: result for run, result in batch}
        remarks = {run.claimed.held: run.remarks for run, _ in batch if run.remarks is not NOTHING}

        async def send(connection: AsyncConnection) -> dict[Held, JobState]:
            stored = await transitions.succeed_many(connection, results, remarks)
            states = dict.fromkeys(stored, JobState.SUCCEEDED)
            if len(stored) < len(results):  # an earlier send may have committed although its answer was lost
                states |= await reads.states_under(connection, [held for held in results if held not in stored])
            return states

        emit(FlushSending(jobs=len(batch)))
        try:
            states = await until_answered(self._processor, send)
        except Exception as error:
            if len(batch) == 1:
                await self._rejected(batch[0][0], error)
                return
            middle = len(batch) // 2
            await self._flush(batch[:middle])
            await self._flush(batch[middle:])
            return
        for run, result in batch:
            match states.get(run.claimed.held):
                case JobState.SUCCEEDED:
                    self._stored(run)
                case JobState.RUNNING:  # ours, and another transaction holds its row, as somebody does who cancels it
                    self._waiting.append((run, result))
                    self._patience = _PATIENCE_WITH_LOCKS
                case _:
                    self._lost(run)
