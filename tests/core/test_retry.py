from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.retry import LONGEST_DELAY, RetryPolicy, as_delay, jittered

POLICY = RetryPolicy(max_attempts=6, first_wait=timedelta(seconds=1), longest_wait=timedelta(seconds=5))


@pytest.mark.parametrize(("failures", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 5), (5, 5)])
def test_the_wait_doubles_until_the_longest(failures: int, seconds: int) -> None:
    assert POLICY.wait_after(failures) == timedelta(seconds=seconds)


@pytest.mark.parametrize("failures", [6, 7, 1_000])
def test_there_is_no_wait_after_the_last_failure(failures: int) -> None:
    assert POLICY.wait_after(failures) is None


def test_one_attempt_means_no_retry() -> None:
    assert RetryPolicy(1, timedelta(0), timedelta(0)).wait_after(1) is None


def test_the_step_asks_nobody_whether_an_attempt_is_left() -> None:
    assert POLICY.step(6) == timedelta(seconds=5)


@pytest.mark.parametrize("first_wait", [timedelta.resolution, timedelta(days=36_500)])
def test_a_long_backoff_ends_at_the_longest_wait_without_overflow(first_wait: timedelta) -> None:
    policy = RetryPolicy(10**30, first_wait, LONGEST_DELAY)

    assert policy.wait_after(10**30 - 1) == LONGEST_DELAY


def test_a_first_wait_of_nothing_stays_nothing() -> None:
    assert RetryPolicy(5, timedelta(0), timedelta(hours=1)).wait_after(4) == timedelta(0)


@pytest.mark.parametrize(
    ("attempts", "first", "longest"),
    [(0, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1), (1, 40_000 * 86_400, 1)],
)
def test_a_policy_out_of_range_is_refused(attempts: int, first: int, longest: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        RetryPolicy(attempts, timedelta(seconds=first), timedelta(seconds=longest))


@given(st.integers(1, 200), st.floats(0, 1))
def test_jitter_never_waits_longer_than_the_step(failures: int, fraction: float) -> None:
    wait = RetryPolicy(1_000, timedelta(seconds=1), timedelta(hours=1)).step(failures)

    assert timedelta(0) <= jittered(wait, fraction) <= wait


@pytest.mark.parametrize(("fraction", "seconds"), [(0.0, 0), (0.5, 5), (1.0, 10)])
def test_jitter_takes_the_fraction_of_the_whole_wait(fraction: float, seconds: int) -> None:
    assert jittered(timedelta(seconds=10), fraction) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("value", "delay"),
    [
        (0, timedelta(0)),
        (1.5, timedelta(seconds=1.5)),
        (timedelta(minutes=1), timedelta(minutes=1)),
        (LONGEST_DELAY, LONGEST_DELAY),
        (LONGEST_DELAY.total_seconds(), LONGEST_DELAY),
    ],
)
def test_a_delay_is_seconds_or_a_timedelta(value: float | timedelta, delay: timedelta) -> None:
    assert as_delay(value) == delay


@pytest.mark.parametrize(
    "value",
    [
        -1,
        -0.001,
        math.nan,
        math.inf,
        -math.inf,
        1e300,
        pytest.param(10**400, id="huge"),
        timedelta(microseconds=-1),
        timedelta(days=36_501),
    ],
)
def test_a_delay_out_of_range_is_refused(value: float | timedelta) -> None:
    with pytest.raises(ValueError, match="grace must be between 0 seconds and 36,500 days"):
        as_delay(value, "grace")


@pytest.mark.parametrize("value", ["1", None, [1]])
def test_a_delay_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="seconds or a timedelta"):
        as_delay(value)  # type: ignore[arg-type]
