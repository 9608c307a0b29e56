"""How often to do what may take long."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

REST_FOR_TIME: Final = 10
"""It rests so many times as long as it took: an eleventh of the time is what it costs at the most."""


def rest_for(took: timedelta) -> timedelta:
    """How long to rest after what took so long."""
    return took * REST_FOR_TIME


class Pace:
    """Says at each opportunity whether to do, besides, what is to cost no more than its share of the time.

    What failed did so for its length, or for another reason: it is left out once, and tried again.

    Args:
        clock: monotonic, in seconds.

    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rests_until = self._began = -float("inf")
        self._taken = self._has_failed = False

    def begin(self) -> bool:
        """An opportunity begins: whether to do it."""
        self._began = self._clock()
        self._taken = not self._has_failed and self._began >= self._rests_until
        self._has_failed = False
        return self._taken

    def end(self, *, failed: bool) -> None:
        """The opportunity that has begun ends."""
        if self._taken and not failed:
            now = self._clock()
            self._rests_until = now + rest_for(timedelta(seconds=now - self._began)).total_seconds()
        self._has_failed = self._taken and failed
