"""When a cron expression comes: by the clocks of a zone, on ordinary days and when they change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.core.cron import Cron

BERLIN, NEW_YORK, LORD_HOWE = "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"


def ticks(expression: str, zone: str, start: str, end: str) -> list[str]:
    """What comes after the start and not after the end, as the clocks of the zone show it."""
    cron, place = Cron(expression, zone), ZoneInfo(zone)
    now, until = (datetime.fromisoformat(one).replace(tzinfo=UTC) for one in (start, end))
    found = []
    while (now := cron.after(now)) <= until:
        found.append(now.astimezone(place).isoformat(timespec="minutes"))
    return found


@pytest.mark.parametrize(
    ("expression", "start", "expected"),
    [
        ("* * * * *", "2026-11-26T10:00:00", "2026-11-26T10:01:00"),
        ("* * * * *", "2026-11-26T10:00:59.999999", "2026-11-26T10:01:00"),
        ("*/15 * * * *", "2026-11-26T10:59:00", "2026-11-26T11:00:00"),
        ("30 3 * * *", "2026-11-26T03:30:00", "2026-11-27T03:30:00"),
        ("0 9-17/2 * * MON-FRI", "2026-11-27T17:00:00", "2026-11-30T09:00:00"),
        ("0 0 1,15 * *", "2026-11-26T00:00:00", "2026-12-01T00:00:00"),
        ("0 0 L * *", "2026-02-01T00:00:00", "2026-02-28T00:00:00"),
        ("0 0 29 2 *", "2026-01-01T00:00:00", "2028-02-29T00:00:00"),
        ("0 0 13 * 5", "2026-11-26T00:00:00", "2026-11-27T00:00:00"),  # a 13th or a Friday, as cron has it
        ("59 23 31 DEC *", "2026-12-31T23:59:00", "2027-12-31T23:59:00"),
    ],
)
def test_what_an_expression_means(expression: str, start: str, expected: str) -> None:
    found = Cron(expression).after(datetime.fromisoformat(start).replace(tzinfo=UTC))

    assert found == datetime.fromisoformat(expected).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "zone", "start", "end", "expected"),
    [
        # The clocks go forward: a time that does not exist comes when they do, once.
        ("30 2 * * *", BERLIN, "2027-03-27T12:00", "2027-03-28T12:00", ["2027-03-28T03:00+02:00"]),
        ("*/20 2 * * *", BERLIN, "2027-03-27T12:00", "2027-03-28T12:00", ["2027-03-28T03:00+02:00"]),
        ("0 2,3 * * *", BERLIN, "2027-03-27T12:00", "2027-03-28T12:00", ["2027-03-28T03:00+02:00"]),
        ("30 1,3 * * *", BERLIN, "2027-03-27T12:00", "2027-03-28T12:00", ["2027-03-28T01:30+01:00", "2027-03-28T03:30+02:00"]),
        ("30 2 * * *", NEW_YORK, "2027-03-14T05:00", "2027-03-14T12:00", ["2027-03-14T03:00-04:00"]),
        ("15 2 * * *", LORD_HOWE, "2027-10-02T13:00", "2027-10-03T01:00", ["2027-10-03T02:30+11:00"]),
        ("45 2 * * *", LORD_HOWE, "2027-10-02T13:00", "2027-10-03T01:00", ["2027-10-03T02:45+11:00"]),
        # They go back: a time that exists twice comes the first time.
        ("30 2 * * *", BERLIN, "2027-10-30T12:00", "2027-10-31T12:00", ["2027-10-31T02:30+02:00"]),
        ("0 2,3 * * *", BERLIN, "2027-10-30T12:00", "2027-10-31T12:00", ["2027-10-31T02:00+02:00", "2027-10-31T03:00+01:00"]),
        ("30 1 * * *", NEW_YORK, "2027-11-07T00:00", "2027-11-07T12:00", ["2027-11-07T01:30-04:00"]),
        ("45 1 * * *", LORD_HOWE, "2027-04-03T12:00", "2027-04-04T01:00", ["2027-04-04T01:45+11:00"]),
        # An expression of all hours goes on through both.
        ("30 * * * *", BERLIN, "2027-03-28T00:00", "2027-03-28T02:00", ["2027-03-28T01:30+01:00", "2027-03-28T03:30+02:00"]),
        (
            "*/30 * * * *", BERLIN, "2027-10-31T00:00", "2027-10-31T02:00",
            ["2027-10-31T02:30+02:00", "2027-10-31T02:00+01:00", "2027-10-31T02:30+01:00", "2027-10-31T03:00+01:00"],
        ),
        (
            "45 * * * *", LORD_HOWE, "2027-04-03T14:00", "2027-04-03T16:30",
            ["2027-04-04T01:45+11:00", "2027-04-04T01:45+10:30", "2027-04-04T02:45+10:30"],
        ),
        ("0 */1 * * *", NEW_YORK, "2027-11-07T05:00", "2027-11-07T07:00", ["2027-11-07T01:00-05:00", "2027-11-07T02:00-05:00"]),
    ],
)  # fmt: skip
def test_when_the_clocks_change(expression: str, zone: str, start: str, end: str, expected: list[str]) -> None:
    assert ticks(expression, zone, start, end) == expected


def test_a_night_without_a_change_is_as_any_other() -> None:
    found = ticks("30 2 * * *", BERLIN, "2027-03-24T12:00", "2027-03-31T12:00")

    assert len(found) == 7


# ── against a slow reference that knows nothing of cronsim ──────────────────────────────────────────────────────────

_CHANGES = {
    BERLIN: ["2027-03-28T01:00", "2027-10-31T01:00"],
    NEW_YORK: ["2027-03-14T07:00", "2027-11-07T06:00"],
    LORD_HOWE: ["2027-04-03T15:00", "2027-10-02T15:30"],
}
_MINUTE = timedelta(minutes=1)


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, set[int], set[int], set[int]]:
    """An expression, with the minutes, hours and weekdays (0 is Sunday) that it names."""
    minutes = draw(st.sets(st.integers(0, 59), min_size=1, max_size=4))
    hours = draw(st.one_of(st.just(set(range(24))), st.sets(st.integers(0, 4), min_size=1, max_size=3)))
    weekdays = draw(st.one_of(st.just(set(range(7))), st.sets(st.integers(0, 6), min_size=5, max_size=6)))

    def listed(numbers: set[int], all_: int) -> str:
        return "*" if len(numbers) == all_ else ",".join(map(str, sorted(numbers)))

    return f"{listed(minutes, 60)} {listed(hours, 24)} * * {listed(weekdays, 7)}", minutes, hours, weekdays


def _reference(
    minutes: set[int], hours: set[int], weekdays: set[int], zone: ZoneInfo, start: datetime, end: datetime
) -> list[datetime]:
    """Walk through all minutes that the world has; and for times of day, through all that clocks could show."""

    def named(wall: datetime) -> bool:
        return wall.minute in minutes and wall.hour in hours and wall.isoweekday() % 7 in weekdays

    moments, moment = [], start - timedelta(hours=30)
    while (moment := moment + _MINUTE) <= end + timedelta(hours=30):
        moments.append((moment, moment.astimezone(zone).replace(tzinfo=None)))
    if len(hours) == 24:
        return [moment for moment, wall in moments if start < moment <= end and named(wall)]
    first: dict[datetime, datetime] = {}
    for moment, wall in moments:
        first.setdefault(wall, moment)
    found, wall = set(), moments[0][1]
    while (wall := wall + _MINUTE) < moments[-1][1]:
        if named(wall):
            shown = wall
            while shown not in first:
                shown += _MINUTE
            found.add(first[shown])
    return sorted(moment for moment in found if start < moment <= end)


@settings(max_examples=60)
@given(expressions(), st.sampled_from(sorted(_CHANGES)), st.integers(0, 1), st.integers(-600, 300))
def test_it_comes_when_a_slow_reference_says(
    expression: tuple[str, set[int], set[int], set[int]], zone: str, which: int, minutes_after: int
) -> None:
    text, minutes, hours, weekdays = expression
    change = datetime.fromisoformat(_CHANGES[zone][which]).replace(tzinfo=UTC)
    start = change + timedelta(minutes=minutes_after)
    end = start + timedelta(hours=12)
    cron, found, now = Cron(text, zone), [], start
    while (now := cron.after(now)) <= end:
        found.append(now)

    assert found == _reference(minutes, hours, weekdays, ZoneInfo(zone), start, end)


@given(st.sampled_from(["30 2 * * *", "*/7 * * * *", "0 1-3 * * *", "15 2 1 * *"]), st.sampled_from(sorted(_CHANGES)))
def test_each_comes_later_than_the_one_before_and_whoever_asks_in_between_hears_the_same(
    expression: str, zone: str
) -> None:
    cron, now, found = Cron(expression, zone), datetime(2027, 3, 1, tzinfo=UTC), []
    for _ in range(50):
        now = cron.after(now)
        found.append(now)

    for one, next_ in pairwise(found):
        assert one < next_
        assert cron.after(one + (next_ - one) / 2) == next_
        assert cron.after(next_ - timedelta.resolution) == next_


# ── what is none ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", "has five fields"),
        ("0 3 * *", "has five fields"),
        ("0 0 3 * * *", "has five fields"),
        ("@daily", "has five fields"),
        ("60 3 * * *", "bad minute"),
        ("0 24 * * *", "bad hour"),
        ("0 3 0 * *", "bad day-of-month"),
        ("0 3 * 13 *", "bad month"),
        ("0 3 * * 8", "bad day-of-week"),
        ("*/0 3 * * *", "bad minute"),
        ("0 0 30 2 *", "bad day-of-month"),
    ],
)
def test_what_is_no_expression_is_refused_with_an_example(expression: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"is no cron expression.*{why}.*0 3 \* \* \*"):
        Cron(expression)


@pytest.mark.parametrize(
    ("zone", "said"),
    [
        ("Europe/Berln", "did you mean 'Europe/Berlin'"),
        ("Mars", "there is no time zone 'Mars'"),
        ("", "there is no time zone ''"),
        ("../../etc/passwd", "there is no time zone"),
        ("Europe", "there is no time zone 'Europe'"),
    ],
)
def test_a_zone_that_there_is_not_is_refused(zone: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cron("0 3 * * *", zone)


@given(st.lists(st.text("0123456789*/,-#?LWMONFRIJAN²٣", max_size=6), min_size=5, max_size=5))
def test_whatever_is_typed_is_an_expression_or_a_value_error(fields: list[str]) -> None:
    try:
        cron = Cron(" ".join(fields), BERLIN)
    except ValueError:
        return
    assert cron.after(datetime(2027, 1, 1, tzinfo=UTC)) > datetime(2027, 1, 1, tzinfo=UTC)
