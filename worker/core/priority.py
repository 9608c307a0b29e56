"""Which of two due jobs comes first: the more urgent, until the other has waited so much longer."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

DEFAULT_PRIORITY: Final = 5
PRIORITIES: Final = range(10)
"""0 comes first."""

STEP: Final = timedelta(minutes=15)
"""How much sooner each step makes a job: due jobs go in the order of due time + (priority - 5) · STEP.

So priority 0 overtakes a backlog of up to 75 minutes of ordinary jobs, and priority 9 waits at most an hour longer than
an ordinary job that came due with it. Longer steps would overtake longer backlogs and let bulk work wait longer.
"""


def as_priority(value: object) -> int:
    """A priority, checked.

    Raises:
        ValueError: it is no whole number from 0 to 9.

    """
    if not isinstance(value, int) or isinstance(value, bool) or value not in PRIORITIES:
        raise ValueError(f"priority must be a whole number from 0 (first) to 9, not {value!r}")
    return value
