from __future__ import annotations

from worker.supervise.backoff import Backoff


def test_each_death_doubles_the_wait_up_to_a_minute() -> None:
    backoff = Backoff()

    assert [backoff.after(lived=1).total_seconds() for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_a_process_that_lived_for_a_minute_begins_anew() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.after(lived=1)

    assert backoff.after(lived=60).total_seconds() == 0.5
    assert backoff.after(lived=59).total_seconds() == 1
