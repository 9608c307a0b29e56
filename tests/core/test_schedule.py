"""When a schedule ticks, and which ticks get a job."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.context import JobContext
from worker.core.errors import DefinitionError
from worker.core.schedule import MISSED_AFTER, MOST_CAUGHT_UP, CatchUp, Schedule
from worker.flow.job import JobFunction

SINCE = datetime(2027, 1, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def made(**given: Any) -> Schedule:
    found = Schedule.of(**given)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("moment", "expected"), [(-5000, 90), (0, 90), (89.999999, 90), (90, 180), (91, 180), (900_000, 900_090)]
)
def test_every_counts_from_when_the_schedule_was_made(moment: float, expected: float) -> None:
    found = made(every=90).after(SINCE + timedelta(seconds=moment), SINCE)

    assert found == SINCE + timedelta(seconds=expected)


@pytest.mark.parametrize(
    ("catch_up", "late", "expected"),
    [
        ("last", 0, [0]),
        ("last", 35, [30]),
        ("skip", 0, [0]),
        ("skip", 31, [30]),
        ("skip", 35, []),
        ("all", 35, [0, 10, 20, 30]),
    ],
)
def test_ticks_that_are_due_get_what_catch_up_says(catch_up: str, late: int, expected: list[int]) -> None:
    first = SINCE + 10 * MINUTE

    found = made(every=10 * MINUTE, catch_up=catch_up).due(first, first + late * MINUTE, SINCE)

    assert found == [first + minutes * MINUTE for minutes in expected]


def test_where_no_two_may_overlap_of_all_that_were_missed_the_last_gets_a_job() -> None:
    found = made(every=10 * MINUTE, catch_up="all", overlap="skip").due(SINCE, SINCE + 35 * MINUTE, SINCE)

    assert found == [SINCE + 30 * MINUTE]


@given(
    st.sampled_from([{"every": 1}, {"every": 77}, {"cron": "*/7 * * * *"}, {"cron": "5 2 * * *", "timezone": "Europe/Berlin"}]),
    st.sampled_from(["skip", "last", "all"]),
    st.integers(0, 20_000),
)  # fmt: skip
def test_due_is_what_counting_one_by_one_gives(rhythm: dict[str, Any], catch_up: CatchUp, seconds: int) -> None:
    schedule = made(**rhythm, catch_up=catch_up)
    first = schedule.after(SINCE, SINCE)
    now = first + timedelta(seconds=seconds)
    ticks = [first]
    while (following := schedule.after(ticks[-1], SINCE)) <= now:
        ticks.append(following)
    young = [tick for tick in ticks[-1:] if now - tick <= MISSED_AFTER]

    found = schedule.due(first, now, SINCE)

    assert found == {"skip": young, "last": ticks[-1:], "all": ticks[-MOST_CAUGHT_UP:]}[catch_up]


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"cron": "0 3 * * *", "every": 60}, "give either cron or every, not both"),
        ({"timezone": "Europe/Berlin"}, "timezone belongs to a schedule; give cron or every"),
        ({"overlap": "skip"}, "overlap belongs to a schedule"),
        ({"every": 60, "timezone": "UTC"}, "knows no timezone"),
        ({"every": 0}, "at least a second, not 0"),
        ({"every": timedelta(milliseconds=999)}, "at least a second"),
        ({"every": -1}, "every must be between"),
        ({"every": "5m"}, "every must be seconds or a timedelta, not str"),
        ({"every": 60, "catch_up": "some"}, 'catch_up must be one of "skip", "last", "all", not \'some\''),
        ({"every": 60, "overlap": "never"}, 'overlap must be one of "allow", "skip"'),
        ({"cron": "0 3 * * *", "timezone": "Europe/Berln"}, "did you mean 'Europe/Berlin'"),
        ({"cron": "0 25 * * *"}, "'0 25 \\* \\* \\*' is no cron expression: bad hour"),
        ({"cron": 5}, "is no cron expression"),
    ],
)
def test_a_definition_with_a_schedule_that_is_none_is_refused_in_one_line(given_: dict[str, Any], said: str) -> None:
    async def nightly(ctx: JobContext) -> None: ...

    with pytest.raises(DefinitionError, match=rf"nightly: .*{said}") as refused:
        JobFunction(nightly, **given_)

    assert "\n" not in str(refused.value)


def test_a_job_that_needs_arguments_cannot_be_the_clocks() -> None:
    async def charge(ctx: JobContext, invoice_id: int, memo: str = "") -> None: ...

    with pytest.raises(DefinitionError, match=r"charge: nobody gives the clock's jobs arguments.*invoice_id$"):
        JobFunction(charge, cron="0 3 * * *")
