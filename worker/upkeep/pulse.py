"""Pulse: looked at from another thread, whether the event loop moves, and which job holds it when it does not."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any, Final

from worker.flow.holdings import Holdings
from worker.observe.events import LoopBlocked, emit

# Often enough to charge a job with most of what it held; four looks a second cost a loop nothing.
LOOK_EVERY: Final = timedelta(milliseconds=250)
_TOLD_FROM: Final = 1.0


class Pulse:
    """Asks the loop to answer and charges the job that keeps it from it; `look` again and again from the other thread.

    Args:
        loop: the loop that runs the jobs.
        holdings: whose tasks are charged.

    """

    def __init__(self, loop: asyncio.AbstractEventLoop, holdings: Holdings) -> None:
        self._loop = loop
        self._holdings = holdings
        self._asked: float | None = None
        self._seen: asyncio.Task[Any] | None = None
        self._looked = 0.0
        self._told = 0.0

    @property
    def blocked(self) -> float:
        """For how many seconds the loop has not answered."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def look(self) -> None:
        """Look once: the task that stood here at the last look too, without an answer since, has held the loop."""
        now, task = time.monotonic(), asyncio.current_task(self._loop)
        if self._asked is None:
            self._asked, self._told = now, 0.0
            self._loop.call_soon_threadsafe(self._answer)
        elif task is not None and task is self._seen:
            self._charge(task, now - self._looked)
        self._seen, self._looked = task, now
        if self.blocked >= max(_TOLD_FROM, 2 * self._told):
            self._told = self.blocked
            emit(LoopBlocked(task=task.get_name() if task else "unknown", seconds=self._told))

    def _charge(self, task: asyncio.Task[Any], seconds: float) -> None:
        for run in self._holdings.runs().values():
            if run.task is task and run.in_function and not run.measured:
                run.charge(seconds)

    def _answer(self) -> None:
        self._asked = None
