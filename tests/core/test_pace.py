"""What may take long takes no more than its share of the time."""

from __future__ import annotations

from worker.core.pace import REST_FOR_TIME, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def opportunity(pace: Pace, clock: Clock, *, takes: float, fails: bool = False) -> bool:
    taken = pace.begin()
    clock.now += takes if taken else 0
    pace.end(failed=fails)
    return taken


def test_it_rests_the_longer_the_longer_it_took() -> None:
    clock = Clock()
    pace = Pace(clock)

    assert opportunity(pace, clock, takes=2)
    assert not opportunity(pace, clock, takes=2)
    clock.now += 2 * REST_FOR_TIME - 0.001
    assert not opportunity(pace, clock, takes=2)
    clock.now += 0.001
    assert opportunity(pace, clock, takes=2)


def test_what_takes_no_time_is_done_at_each_opportunity() -> None:
    clock = Clock()
    pace = Pace(clock)

    assert [opportunity(pace, clock, takes=0) for _ in range(3)] == [True] * 3


def test_what_failed_is_left_out_once_and_tried_again_however_long_it_took() -> None:
    clock = Clock()
    pace = Pace(clock)

    found = [opportunity(pace, clock, takes=3, fails=fails) for fails in (True, False, True, True, False)]

    assert found == [True, False, True, False, True]
