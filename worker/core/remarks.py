"""What there is to tell of an attempt besides how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

NOTABLE_BLOCK: Final = timedelta(seconds=1)
"""From here on everything else in the process has visibly waited for the job: half the time between two beats."""


@dataclass(frozen=True, slots=True)
class Remarks:
    """What an attempt's row says of it, whichever way it ended.

    Args:
        blocked: for how long it held the event loop, so that nothing else in its process moved.
        lazy_loads: how often each attribute was loaded lazily.
        over_budget: whether those were more than its definition allows.

    """

    blocked: timedelta | None = None
    lazy_loads: dict[str, int] | None = None
    over_budget: bool = False

    @property
    def notable(self) -> bool:
        """Whether a success, which leaves no row by itself, leaves one to tell this."""
        return self.over_budget or (self.blocked is not None and self.blocked >= NOTABLE_BLOCK)


NOTHING: Final = Remarks()
"""Of most attempts there is nothing to tell."""
