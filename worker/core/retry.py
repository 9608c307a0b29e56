"""How long to wait before the next attempt."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

LONGEST_DELAY = timedelta(days=36_500)
"""Delays end here: a later `run_at` would leave the range of Python's datetime."""

_STEP = timedelta.resolution
_DOUBLINGS = 67  # one microsecond doubled this often is longer than any timedelta


def is_near(moment: datetime, now: datetime) -> bool:
    """Whether a moment with a time zone lies within the longest delay of now: all clocks can compute with it."""
    try:
        return abs(moment - now) <= LONGEST_DELAY
    except OverflowError:
        return False


def as_delay(value: float | timedelta, what: str = "delay") -> timedelta:
    """A delay given in seconds or as a timedelta, checked.

    Raises:
        TypeError: it is neither.
        ValueError: it is negative, not a number, or more than 36,500 days.

    """
    if not isinstance(value, int | float | timedelta):
        raise TypeError(f"{what} must be seconds or a timedelta, not {type(value).__name__}")
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not 0 <= seconds <= LONGEST_DELAY.total_seconds():  # false for NaN too
        raise ValueError(f"{what} must be between 0 seconds and 36,500 days, not {value!s}")
    return value if isinstance(value, timedelta) else timedelta(seconds=value)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a job may fail, and how long it waits in between.

    Args:
        max_attempts: failures that end the job, at least 1.
        first_wait: the longest wait after the first failure; it doubles with each further one.
        longest_wait: where the doubling stops.

    Raises:
        ValueError: a value is out of range.

    """

    max_attempts: int
    first_wait: timedelta
    longest_wait: timedelta

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {self.max_attempts}")
        as_delay(self.first_wait, "first_wait")
        as_delay(self.longest_wait, "longest_wait")

    def wait_after(self, failures: int) -> timedelta | None:
        """How long to wait, before jitter, after this many failures (1 or more); None when that was the last."""
        if failures >= self.max_attempts:
            return None
        return self.step(failures)

    def step(self, failures: int) -> timedelta:
        """The backoff's step after this many failures (1 or more), whether or not another attempt is allowed."""
        doublings = min(max(failures - 1, 0), _DOUBLINGS)
        return min((self.first_wait // _STEP) << doublings, self.longest_wait // _STEP) * _STEP


def jittered(wait: timedelta, fraction: float) -> timedelta:
    """Full jitter: `fraction`, drawn uniformly from 0 to 1, of the wait.

    See "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: of the ways compared there,
    uniform(0, wait) spreads clients that failed together best and costs the fewest calls.
    """
    return wait * fraction
