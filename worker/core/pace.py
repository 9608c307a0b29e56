"""How often to do what may take long."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

_REST_FOR_TIME: Final = 10  # an eleventh of the time is what it costs, up to the longest rest
_LONGEST_REST: Final = 3  # leases: time enough to find a worker dead meanwhile


def rest_for(took: timedelta, *, longest: timedelta) -> timedelta:
    """How long to rest after what took so long."""
    return min(took * _REST_FOR_TIME, longest)


class Pace:
    """Says whether something is due that is to cost no more than its share of the time.

    Args:
        lease: of the worker; it rests for three at the most, however long it took.
        clock: monotonic, in seconds.

    """

    def __init__(self, lease: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest = _LONGEST_REST * lease
        self._clock = clock
        self._rests_until = -float("inf")

    @property
    def due(self) -> bool:
        """Whether it has rested long enough."""
        return self._clock() >= self._rests_until

    def now(self) -> float:
        """When it begins, for `rest`."""
        return self._clock()

    def rest(self, began: float) -> None:
        """It has taken place, from this moment until now."""
        now = self._clock()
        took = timedelta(seconds=now - began)
        self._rests_until = now + rest_for(took, longest=self._longest).total_seconds()
