"""Who stopped beating, by one watcher's own clock."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from uuid import UUID


class Watch:
    """Convicts a worker whose beat did not change for a whole lease, while this watcher looked without a gap.

    Args:
        lease: how long a beat may stay unchanged.
        longest_gap: between two looks; after a longer one everything is seen as if for the first time, so that a
            minute without PostgreSQL convicts nobody.

    """

    def __init__(self, lease: timedelta, longest_gap: timedelta) -> None:
        self._lease = lease.total_seconds()
        self._longest_gap = longest_gap.total_seconds()
        self._since: dict[UUID, tuple[int | None, float]] = {}
        self._last_look: float | None = None

    def look(self, beats: Mapping[UUID, int | None], now: float) -> dict[UUID, int | None]:
        """Those that are dead, each with the beat that convicts it; `now` is monotonic, in seconds."""
        if self._last_look is not None and now - self._last_look > self._longest_gap:
            self._since.clear()
        self._last_look = now
        self._since = {worker: self._seen(worker, beat, now) for worker, beat in beats.items()}
        return {worker: beat for worker, (beat, since) in self._since.items() if now - since >= self._lease}

    def next_conviction(self, now: float) -> timedelta | None:
        """How long until a lease ends whose worker has not yet been found dead; None when nobody is watched."""
        left = [since + self._lease - now for _, since in self._since.values() if now - since < self._lease]
        return timedelta(seconds=min(left)) if left else None

    def _seen(self, worker: UUID, beat: int | None, now: float) -> tuple[int | None, float]:
        before = self._since.get(worker)
        return before if before is not None and before[0] == beat else (beat, now)
