"""How long a process that died waits for its restart."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

_FIRST: Final = timedelta(milliseconds=500)
_LONGEST: Final = timedelta(minutes=1)
_HEALTHY: Final = timedelta(minutes=1)


class Backoff:
    """Waits that double with each death, until a process has lived for a minute."""

    def __init__(self) -> None:
        self._next = _FIRST

    def after(self, lived: float) -> timedelta:
        """How long to wait after the death of a process that lived for so many seconds."""
        if lived >= _HEALTHY.total_seconds():
            self._next = _FIRST
        wait, self._next = self._next, min(2 * self._next, _LONGEST)
        return wait
