"""A clock that stands still, for jobs whose times are PostgreSQL's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Engine, event

from worker.core.retry import as_delay

_CLOCKS: Final = re.compile(
    r"\b(?:(?:now|clock_timestamp|statement_timestamp|transaction_timestamp)\(\)|CURRENT_TIMESTAMP\b)", re.IGNORECASE
)
_frozen: list[FrozenClock] = []


class FrozenClock:
    """What time it is for the statements of this process, until the test says otherwise."""

    def __init__(self, at: datetime) -> None:
        self._now = _with_zone(at)

    @property
    def now(self) -> datetime:
        """The time at which the clock stands."""
        return self._now

    def move_to(self, moment: datetime) -> None:
        """Set the clock.

        Args:
            moment: any moment, with a time zone.

        Raises:
            ValueError: it has no time zone.

        """
        self._now = _with_zone(moment)

    def tick(self, by: float | timedelta) -> None:
        """Let time pass.

        Args:
            by: seconds, or a timedelta.

        Raises:
            ValueError: it is negative; `move_to` goes back.

        """
        self._now += as_delay(by, "by")


@contextmanager
def frozen_clock(at: datetime | None = None) -> Iterator[FrozenClock]:
    """Have PostgreSQL's clock stand still for all statements that SQLAlchemy sends while the block lasts.

    When a job is due, when its retry is, when it expires: Exarq asks PostgreSQL's clock, which no library for Python's
    clock can stop. So the statements name the time of this clock where they would ask for `now()`, `clock_timestamp()`
    and their like: the user's as well as Exarq's, on every engine of this process. Enter it before the first enqueue.
    Defaults of columns, triggers and functions on the server go on with the server's own clock.

    Args:
        at: where it stands first, with a time zone; without one, now by Python's clock.

    Raises:
        ValueError: `at` has no time zone.

    """
    clock = FrozenClock(current_time() if at is None else at)
    if not _frozen:
        event.listen(Engine, "before_cursor_execute", _name_the_time, retval=True)
    _frozen.append(clock)
    try:
        yield clock
    finally:
        _frozen.remove(clock)
        if not _frozen:
            event.remove(Engine, "before_cursor_execute", _name_the_time)


def current_time() -> datetime:
    """What time it is: the innermost frozen clock's, else Python's."""
    return _frozen[-1].now if _frozen else datetime.now(UTC)


def _name_the_time(
    _connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool
) -> tuple[str, Any]:
    return _CLOCKS.sub(f"'{_frozen[-1].now.isoformat()}'::timestamptz", statement), parameters


def _with_zone(moment: datetime) -> datetime:
    if moment.utcoffset() is None:
        raise ValueError("the clock needs a time zone, for example datetime(2027, 1, 1, tzinfo=UTC)")
    return moment
