"""Which jobs somebody waits for: a worker tells them once the end of one is committed."""

from __future__ import annotations

import time
from collections import deque
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
        # A job may end while the message that somebody waits for it is on its way.
        self._just_ended: deque[UUID] = deque(maxlen=_REMEMBERED)

    def heard(self, awaited: EndAwaited) -> None:
        """Somebody waits for this job, which may run here or elsewhere, have ended, or never have been."""
        if awaited.job_id in self._just_ended:
            self._publish([Ended(awaited.job_id, awaited.waiter_id)])
            return
        now = time.monotonic()
        if len(self._waits) >= _MOST:
            self._waits = {job: waits for job, waits in self._waits.items() if max(waits.values()) > now}
        if len(self._waits) < _MOST or awaited.job_id in self._waits:
            self._waits.setdefault(awaited.job_id, {})[awaited.waiter_id] = now + _BELIEVED_FOR.total_seconds()

    def ended(self, job_id: UUID) -> None:
        """The end of this job is committed."""
        self._just_ended.append(job_id)
        if self._waits and (waits := self._waits.pop(job_id, None)):
            now = time.monotonic()
            self._publish([Ended(job_id, waiter) for waiter, until in waits.items() if until > now])
