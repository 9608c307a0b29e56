"""When a schedule ticks, and what becomes of ticks that came while nobody was there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias, get_args

from worker.core.cron import Cron
from worker.core.retry import as_delay

CatchUp: TypeAlias = Literal["skip", "last", "all"]
Overlap: TypeAlias = Literal["allow", "skip"]

MISSED_AFTER: Final = timedelta(minutes=1)
"""A tick that is older than this was missed; a worker that died in the middle of one costs seconds."""

MOST_CAUGHT_UP: Final = 1_000
"""So many missed ticks get their job with `catch_up="all"`, the newest."""

_SHORTEST: Final = timedelta(seconds=1)
_FIRST_LOOK: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When jobs are to be enqueued without anybody who does it.

    Args:
        cron: an expression of five fields, by the clocks of `timezone`; or None, and then `every` is given.
        timezone: a name such as Europe/Berlin.
        every: the time between two ticks, at least a second; the first comes so long after the schedule was made.
        catch_up: what ticks get that nobody made before the next one came: "last" the last of them a job, "skip" that
            one only if it was missed by no more than `MISSED_AFTER`, "all" each one, `MOST_CAUGHT_UP` at the most.
        overlap: with "skip" a tick gets no job while the one of an earlier tick waits or runs, so of those that were
            missed only the last gets one.

    """

    cron: str | None = None
    timezone: str = "UTC"
    every: timedelta | None = None
    catch_up: CatchUp = "last"
    overlap: Overlap = "allow"

    @classmethod
    def of(
        cls,
        *,
        cron: str | None = None,
        timezone: str | None = None,
        every: float | timedelta | None = None,
        catch_up: str | None = None,
        overlap: str | None = None,
    ) -> Schedule | None:
        """What was given, checked; None where nothing was.

        Raises:
            ValueError: it makes no schedule; the message says what does.
            TypeError: likewise.

        """
        if cron is None and every is None:
            given = {"timezone": timezone, "catch_up": catch_up, "overlap": overlap}
            if alone := next((name for name, value in given.items() if value is not None), None):
                raise ValueError(f"{alone} belongs to a schedule; give cron or every, too, or leave it out")
            return None
        if cron is not None and every is not None:
            raise ValueError("give either cron or every, not both")
        if timezone is not None and cron is None:
            raise ValueError("every counts time that has passed and knows no timezone; leave it out, or give cron")
        if cron is not None:
            cron = " ".join(Cron(cron, timezone or "UTC").expression.split())
        return cls(
            cron,
            timezone or "UTC",
            None if every is None else _checked_every(every),
            _one_of(CatchUp, catch_up or "last", "catch_up"),
            _one_of(Overlap, overlap or "allow", "overlap"),
        )

    def after(self, moment: datetime, since: datetime) -> datetime:
        """The first tick later than this moment.

        Args:
            moment: any, with a time zone.
            since: when the schedule was made, from which `every` counts.

        Raises:
            ValueError: there is none within fifty years.

        """
        if self.every is None:
            assert self.cron is not None
            return _cron(self.cron, self.timezone).after(moment)
        return since + max((moment - since) // self.every + 1, 1) * self.every

    def due(self, first: datetime, now: datetime, since: datetime) -> list[datetime]:
        """The ticks that get a job now, in order; none where all are to be skipped.

        Args:
            first: the first tick that has had none, not later than `now`.
            now: what time it is.
            since: when the schedule was made.

        """
        each = self.catch_up == "all" and self.overlap == "allow"
        newest = self._newest(first, now, since, MOST_CAUGHT_UP if each else 1)
        if self.catch_up == "skip":
            return [tick for tick in newest if now - tick <= MISSED_AFTER]
        return newest

    def _newest(self, first: datetime, now: datetime, since: datetime, count: int) -> list[datetime]:
        """The last ticks from `first` to `now`, found by looking back twice as far each time."""
        look = _FIRST_LOOK
        while True:
            start = max(first, now - look)
            found = [first] if start == first else []
            tick = self.after(start, since)
            while tick <= now:
                found.append(tick)
                tick = self.after(tick, since)
            if start == first or len(found) >= count:
                return found[-count:]
            look *= 2


_cron = lru_cache(maxsize=1_000)(Cron)  # read once, for a tick asks for the next one


def _checked_every(every: float | timedelta) -> timedelta:
    checked = as_delay(every, "every")
    if checked < _SHORTEST:
        raise ValueError(f"every must be at least a second, not {checked.total_seconds():g}")
    return checked


def _one_of(known: Any, value: str, what: str) -> Any:
    if value not in get_args(known):
        words = ", ".join(f'"{word}"' for word in get_args(known))
        raise ValueError(f"{what} must be one of {words}, not {value!r}")
    return value
