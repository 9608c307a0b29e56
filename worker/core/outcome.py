"""How an attempt ends: what a job may raise, and what follows from it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from sqlalchemy.exc import DBAPIError

from worker.core.errors import DatabaseUnreachable
from worker.core.retry import RetryPolicy, as_delay, jittered

TYPE_LIMIT = 500
MESSAGE_LIMIT = 2_000
TRACEBACK_LIMIT = 20_000
EXPIRED = "expired: "
"""How the reason begins of a job that was cancelled because its deadline was over."""
TRANSIENT_LIMIT = 20
"""Retries after contention or a lost database that count as no failure; from then on they count."""

# serialization_failure, deadlock_detected; ended by an administrator, a crash, a start, a shutdown
_TRANSIENT_SQLSTATES = frozenset({"40001", "40P01", "57P01", "57P02", "57P03"})


class JobSignal(Exception):
    """The base of what a job raises to say how its attempt ends; its writes are rolled back."""


class Retry(JobSignal):
    """Raised by a job to fail this attempt and try again, unless it was the last.

    Args:
        delay: the wait, in seconds or as a timedelta; None takes the definition's backoff.

    Raises:
        ValueError: the delay is negative, not a number, or more than 36,500 days.

    """

    def __init__(self, delay: float | timedelta | None = None) -> None:
        super().__init__(delay)
        self.delay = None if delay is None else as_delay(delay)

    def __str__(self) -> str:
        return "the job asked for another attempt" + ("" if self.delay is None else f" in {self.delay}")


class Snooze(JobSignal):
    """Raised by a job to run again later; counts as no failure.

    Args:
        delay: the wait, in seconds or as a timedelta.

    Raises:
        ValueError: the delay is negative, not a number, or more than 36,500 days.

    """

    def __init__(self, delay: float | timedelta) -> None:
        super().__init__(delay)
        self.delay = as_delay(delay)

    def __str__(self) -> str:
        return f"the job asked to run again in {self.delay}"


class Cancel(JobSignal):
    """Raised by a job to end as cancelled: its work is no longer wanted."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Fail(JobSignal):
    """Raised by a job to end as failed at once, whatever attempts are left."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


def storable_text(text: str, limit: int) -> str:
    """The text as PostgreSQL can keep it: NUL and lone surrogates escaped, the middle cut out beyond `limit`."""
    text = text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= limit:
        return text
    # The mark's own length depends on the number in it; a number of len(text) is as long as any.
    room = limit - len(_cut_mark(len(text)))
    tail = room // 2
    head = room - tail
    return text[:head] + _cut_mark(len(text) - room) + text[-tail:]


def _cut_mark(count: int) -> str:
    return f" … [{count:,} characters cut] … "


@dataclass(frozen=True, slots=True)
class ErrorText:
    """An exception as text that can be stored, whatever was in it."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> ErrorText:
        """The texts of an exception, cut to 500, 2,000 and 20,000 characters; never raises."""
        return cls(
            _safely(lambda: _type_name(type(error)), TYPE_LIMIT),
            _safely(lambda: _message(error), MESSAGE_LIMIT),
            _safely(lambda: "".join(traceback.format_exception(error)), TRACEBACK_LIMIT),
        )


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    """The message; a group's own, as of a TaskGroup, says only how many there are, so the first of them follows."""
    first = error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return str(error) if first is error else f"{error}: {_type_name(type(first))}: {first}"


def _safely(make: Callable[[], str], limit: int) -> str:
    try:
        return storable_text(make(), limit)
    except Exception as error:  # an exception's own __str__ is code of anybody
        return f"<cannot be shown: {type(error).__name__}>"


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The function returned; `result` is JSON text."""

    result: str


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Another attempt after `delay`; `counts` says whether this one is a failure towards `max_attempts`."""

    delay: timedelta
    error: ErrorText
    counts: bool


@dataclass(frozen=True, slots=True)
class Snoozed:
    """Another attempt after `delay`, because the job asked for it; no failure."""

    delay: timedelta


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The job is no longer wanted."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """No further attempt."""

    error: ErrorText


@dataclass(frozen=True, slots=True)
class Released:
    """Given back through no fault of the job (a stop, an unknown function), due again after `delay`."""

    delay: timedelta
    reason: str


Outcome: TypeAlias = Succeeded | RetryAfter | Snoozed | Cancelled | Failed | Released


def outcome_of(
    error: BaseException, policy: RetryPolicy, failures: int, jitter: Callable[[], float], transient: int = 0
) -> Outcome:
    """How an attempt ends that raised `error`.

    Args:
        error: what the function, or the completion, raised.
        policy: how often the job may fail and how long it waits.
        failures: failures counted before this one.
        jitter: draws uniformly from 0 to 1.
        transient: retries so far that counted as no failure.

    """
    match error:
        case Snooze():
            return Snoozed(as_delay(error.delay))
        case Cancel():
            return Cancelled(storable_text(str(error), MESSAGE_LIMIT))
        case Fail():
            return Failed(ErrorText.of(error))
        case DBAPIError() | DatabaseUnreachable() if is_transient(error) and transient < TRANSIENT_LIMIT:
            return RetryAfter(jittered(policy.step(1), jitter()), ErrorText.of(error), counts=False)
    # A mistake of the program's is tried again like any error, for a deploy may mend it while the job waits; to end
    # such a job at once would turn each bad release into jobs that only a person brings back.
    wait = policy.wait_after(failures + 1)
    if wait is None:
        return Failed(ErrorText.of(error))
    asked = as_delay(error.delay) if isinstance(error, Retry) and error.delay is not None else None
    return RetryAfter(jittered(wait, jitter()) if asked is None else asked, ErrorText.of(error), counts=True)


def is_transient(error: DBAPIError | DatabaseUnreachable) -> bool:
    """Whether the transaction ended through no fault of the job: the same work may succeed at once."""
    if isinstance(error, DatabaseUnreachable) or error.connection_invalidated:
        return True
    code = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    return code in _TRANSIENT_SQLSTATES
