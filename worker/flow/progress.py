"""Progress: what running jobs say of themselves, stored together once a second, outside of their transactions."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from worker.core import progress
from worker.core.errors import DefinitionError
from worker.db import transitions
from worker.db.send import once
from worker.db.transitions import Held
from worker.flow.holdings import Run
from worker.observe.events import StepFailed, emit

EVERY: Final = timedelta(seconds=1)


class Reports:
    """The last word of each running job that is not stored yet; of several within a second, the last is.

    Args:
        processor: the engine for Exarq's own statements; without one, nothing is stored.

    """

    def __init__(self, processor: AsyncEngine | None) -> None:
        self._processor = processor
        self._unstored: dict[Held, str] = {}
        self._storing: asyncio.Task[None] | None = None

    def report(self, run: Run, isolation: str | None, said: progress.Progress) -> None:
        """Store this soon; from any thread, and without waiting.

        Raises: `DefinitionError` for a job whose isolation would fail its completion once its row was changed.
        """
        if isolation in ("REPEATABLE READ", "SERIALIZABLE"):
            raise DefinitionError(
                f"{run.claimed.name}: isolation {isolation!r} (of the job or its engine) and progress do not go"
                " together: the job could not complete a row that was changed meanwhile; log how far it is instead"
            )
        if self._processor is None:
            return
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._unstored[run.claimed.held] = json.dumps({**said, "attempt": run.claimed.attempt, "at": at})
        assert run.task is not None
        run.task.get_loop().call_soon_threadsafe(self._store_soon, self._processor)

    async def close(self) -> None:
        """Forget what is not stored."""
        self._unstored.clear()
        if self._storing is not None:
            self._storing.cancel()
            await asyncio.wait([self._storing])

    def _store_soon(self, processor: AsyncEngine) -> None:
        if self._unstored and (self._storing is None or self._storing.done()):
            self._storing = asyncio.get_running_loop().create_task(self._store(processor), name="exarq progress")

    async def _store(self, processor: AsyncEngine) -> None:
        while self._unstored:
            began = time.monotonic()
            # One by one: a thread may have this very dict in its hand.
            batch = {held: self._unstored.pop(held) for held in list(self._unstored)}
            try:
                await once(processor, partial(transitions.note_progress, said=batch))
            except Exception as error:  # the next word of each job tells more
                emit(StepFailed(step="progress", error=f"{type(error).__name__}: {error}"))
            await asyncio.sleep(max(0.0, EVERY.total_seconds() - (time.monotonic() - began)))
