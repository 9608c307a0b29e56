"""Cron expressions in a time zone; cronsim reads them, what clock changes make of them is decided here.

An expression that names hours (`30 2 * * *`) means times of day: one that does not exist, because the clocks go
forward, comes at the moment they do; one that exists twice comes the first time. An expression of all hours (`*/5 * * *
*`) is a rhythm that goes on: it comes at every moment that has such a time of day.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from worker.core.errors import nearest

_EXAMPLE: Final = "minute, hour, day of the month, month and weekday, such as '0 3 * * *' or '*/5 8-18 * * MON-FRI'"
_FIELDS: Final = 5
_LONGEST_CHANGE: Final = timedelta(hours=3)
_MINUTE: Final = timedelta(minutes=1)
_NOTHING: Final = timedelta(0)


@dataclass(frozen=True, slots=True)
class Cron:
    """When a cron expression comes.

    Args:
        expression: five fields: minute, hour, day of the month, month, weekday.
        timezone: the zone whose clocks it means.

    Raises:
        ValueError: it is no such expression, never comes, or there is no such zone.

    """

    expression: str
    timezone: str = "UTC"
    _zone: ZoneInfo = field(init=False, repr=False, compare=False)
    _goes_on: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_zone", zone_of(self.timezone))
        object.__setattr__(self, "_goes_on", len(_parsed(self.expression, datetime(2000, 1, 1)).hours) == 24)
        self.after(datetime(2000, 1, 1, tzinfo=UTC))

    def after(self, moment: datetime) -> datetime:
        """The first moment later than this one, in UTC.

        Raises:
            ValueError: there is none within fifty years.

        """
        found = self._existing_after(moment) if self._goes_on else self._once_after(moment)
        if found is None:
            raise ValueError(f"{self.expression!r} names no day that comes within fifty years")
        return found

    def _once_after(self, moment: datetime) -> datetime | None:
        for wall in self._walls_after(moment.astimezone(self._zone).replace(tzinfo=None)):
            found = self._first(wall)
            if found > moment:
                return found
        return None

    def _existing_after(self, moment: datetime) -> datetime | None:
        # How far the clocks go back soon: what they show then is later, although they have shown it before.
        now, soon = moment.astimezone(self._zone), (moment + _LONGEST_CHANGE).astimezone(self._zone)
        back = max((now.utcoffset() or _NOTHING) - (soon.utcoffset() or _NOTHING), _NOTHING)
        again: list[datetime] = []
        for wall in self._walls_after(now.replace(tzinfo=None) - back):
            first, second = (self._moment(wall, fold) for fold in (0, 1))
            if second is not None and second > moment:
                again.append(second)
            if first is not None and first > moment:
                return min([*again, first])
        return min(again, default=None)

    def _walls_after(self, wall: datetime) -> Iterator[datetime]:
        """Times of day, as the clocks would show them if they were never changed."""
        return _parsed(self.expression, wall)

    def _first(self, wall: datetime) -> datetime:
        while (found := self._moment(wall, 0)) is None:
            wall += _MINUTE
        return found

    def _moment(self, wall: datetime, fold: int) -> datetime | None:
        """The moment at which the clocks show this, the first or the second time; None if they never do."""
        moment = wall.replace(tzinfo=self._zone, fold=fold).astimezone(UTC)
        return moment if moment.astimezone(self._zone).replace(tzinfo=None) == wall else None


def zone_of(name: str) -> ZoneInfo:
    """The time zone with this name.

    Raises:
        ValueError: there is none.

    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError):
        hint = nearest(str(name), available_timezones())
        raise ValueError(
            f"there is no time zone {name!r}{hint or '; one is called Europe/Berlin, another UTC'}"
        ) from None


def _parsed(expression: str, wall: datetime) -> CronSim:
    if not isinstance(expression, str) or len(expression.split()) != _FIELDS:
        raise ValueError(f"{expression!r} is no cron expression; it has five fields: {_EXAMPLE}")
    try:
        return CronSim(expression, wall)
    except CronSimError as error:
        raise ValueError(f"{expression!r} is no cron expression: {str(error).lower()}; {_EXAMPLE}") from None
