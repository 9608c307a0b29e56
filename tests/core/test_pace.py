"""What may take long takes no more than its share of the time."""

from __future__ import annotations

from datetime import timedelta

import pytest

from worker.core.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def test_it_is_due_at_first() -> None:
    assert Pace(timedelta(seconds=10), Clock()).due


@pytest.mark.parametrize(("took", "rest"), [(0, 0), (0.25, 2.5), (2, 20), (3, 30), (60, 30)])
def test_it_rests_ten_times_as_long_as_it_took_and_no_longer_than_three_leases(took: float, rest: float) -> None:
    clock = Clock()
    pace = Pace(timedelta(seconds=10), clock)

    clock.now += took
    pace.rest(clock.now - took)

    assert pace.due == (rest == 0)
    clock.now += max(0, rest - 0.001)
    assert pace.due == (rest == 0)
    clock.now += 0.002
    assert pace.due
