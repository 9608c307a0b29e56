"""Which jobs somebody waits for: a worker tells them once the end of one is committed."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Final
from uuid import UUID

from worker.broker.messages import EndAwaited, Ended

# The waiter says it again with each of its looks, every two seconds.
_BELIEVED_FOR: Final = timedelta(seconds=6)
_MOST: Final = 10_000
_REMEMBERED: Final = 1_000


class Awaited:
    """The waits this worker was told of; what it forgets, the waiter sees with its next look.

    Args:
        publish: tells the waiters, soon.

    """

    def __init__(self, publish: Callable[[Iterable[Ended]], None]) -> None:
        self._publish = publish
        self._waits: dict[UUID, dict[UUID, float]] = {}
        self._waiters = 0
        self._purged = time.monotonic()
        # A job may end while the message that somebody waits for it is on its way.
        self._just_ended: OrderedDict[UUID, None] = OrderedDict()

    def heard(self, awaited: EndAwaited) -> None:
        """Somebody waits for this job, which may run here or elsewhere, have ended, or never have been."""
        if awaited.job_id in self._just_ended:
            self._publish([Ended(awaited.job_id, awaited.waiter_id)])
            return
        now = time.monotonic()
        if now >= self._purged + _BELIEVED_FOR.total_seconds():
            self._purge(now)
        waits = self._waits.get(awaited.job_id)
        if waits is None or awaited.waiter_id not in waits:
            if self._waiters >= _MOST:
                return
            self._waiters += 1
            waits = self._waits.setdefault(awaited.job_id, {})
        waits[awaited.waiter_id] = now + _BELIEVED_FOR.total_seconds()

    def ended(self, job_id: UUID) -> None:
        """The end of this job is committed."""
        self._just_ended[job_id] = None
        if len(self._just_ended) > _REMEMBERED:
            self._just_ended.popitem(last=False)
        if self._waits and (waits := self._waits.pop(job_id, None)):
            self._waiters -= len(waits)
            now = time.monotonic()
            self._publish([Ended(job_id, waiter) for waiter, until in waits.items() if until > now])

    def _purge(self, now: float) -> None:
        """Forget who has not said again that they wait."""
        left = (
            (job, {one: until for one, until in waits.items() if until > now}) for job, waits in self._waits.items()
        )
        self._waits = {job: waits for job, waits in left if waits}
        self._waiters = sum(map(len, self._waits.values()))
        self._purged = now
