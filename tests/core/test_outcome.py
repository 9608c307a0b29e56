from __future__ import annotations

import asyncio
import math
import pickle
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from worker.core.errors import DatabaseUnreachable
from worker.core.outcome import (
    MESSAGE_LIMIT,
    TRACEBACK_LIMIT,
    TRANSIENT_LIMIT,
    TYPE_LIMIT,
    Cancel,
    Cancelled,
    ErrorText,
    Fail,
    Failed,
    JobSignal,
    Outcome,
    Retry,
    RetryAfter,
    Snooze,
    Snoozed,
    outcome_of,
    storable_text,
)
from worker.core.retry import RetryPolicy

POLICY = RetryPolicy(max_attempts=3, first_wait=timedelta(seconds=10), longest_wait=timedelta(hours=1))


class Driver(Exception):
    """A driver's error with the attributes that some drivers give it."""

    def __init__(self, **codes: str | None) -> None:
        super().__init__("the driver's words")
        self.__dict__.update(codes)


def database(**codes: str | None) -> DBAPIError:
    return DBAPIError("SELECT 1", {}, Driver(**codes))


def end(error: BaseException, failures: int = 0, fraction: float = 0.5, transient: int = 0) -> Outcome:
    return outcome_of(error, POLICY, failures, lambda: fraction, transient)


def wait_of(outcome: Outcome) -> float:
    assert isinstance(outcome, RetryAfter)
    return outcome.delay.total_seconds()


# --- the decision


def test_a_delay_set_in_seconds_behind_the_signals_back_is_a_delay_all_the_same() -> None:
    class Later(Retry):
        def __init__(self) -> None:
            self.delay = 5  # type: ignore[assignment]  # as anybody's code may

    assert end(Later()) == RetryAfter(timedelta(seconds=5), ErrorText.of(Later()), counts=True)


@pytest.mark.parametrize(("failures", "seconds"), [(0, 5), (1, 10)])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        TimeoutError(),
        Retry(),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
        IntegrityError("", {}, Driver()),
    ],
)
def test_an_error_is_retried_by_the_backoff_with_jitter(error: BaseException, failures: int, seconds: int) -> None:
    outcome = end(error, failures)

    assert outcome == RetryAfter(timedelta(seconds=seconds), ErrorText.of(error), counts=True)


@pytest.mark.parametrize("error", [ValueError("x"), Retry(), Retry(0), Retry(7)])
@pytest.mark.parametrize("failures", [2, 3, 99])
def test_the_last_failure_fails_the_job(error: BaseException, failures: int) -> None:
    assert end(error, failures) == Failed(ErrorText.of(error))


@pytest.mark.parametrize(("delay", "seconds"), [(7, 7), (0, 0), (timedelta(minutes=1), 60)])
def test_the_delay_of_retry_is_taken_as_it_is(delay: float | timedelta, seconds: int) -> None:
    outcome = end(Retry(delay))

    assert wait_of(outcome) == seconds
    assert isinstance(outcome, RetryAfter)
    assert outcome.counts


@pytest.mark.parametrize("failures", [0, 2, 99])
def test_snooze_cancel_and_fail_do_not_look_at_the_failures(failures: int) -> None:
    assert end(Snooze(60), failures) == Snoozed(timedelta(minutes=1))
    assert end(Cancel("no longer wanted"), failures) == Cancelled("no longer wanted")
    assert end(Fail("bad card"), failures) == Failed(ErrorText.of(Fail("bad card")))


def test_a_reason_to_cancel_can_be_stored() -> None:
    outcome = end(Cancel("a\0\ud800" + "x" * 5_000))

    assert isinstance(outcome, Cancelled)
    assert outcome.reason.startswith("a\\x00\\ud800x")
    assert len(outcome.reason) == MESSAGE_LIMIT


@pytest.mark.parametrize("failures", [0, 2, 99])
@pytest.mark.parametrize(
    "error",
    [
        database(sqlstate="40001"),
        database(sqlstate="40P01"),
        database(pgcode="40001"),
        database(sqlstate=None, pgcode="40P01"),
        OperationalError("", {}, Driver(sqlstate="40P01")),
        database(sqlstate="57P01"),
        DBAPIError("", {}, Exception("connection lost"), connection_invalidated=True),
        DatabaseUnreachable("PostgreSQL does not answer"),
    ],
)
def test_contention_or_a_lost_database_counts_as_no_failure(error: Exception, failures: int) -> None:
    assert end(error, failures) == RetryAfter(timedelta(seconds=5), ErrorText.of(error), counts=False)


@pytest.mark.parametrize(
    "error",
    [
        database(),
        database(sqlstate="23505"),
        database(sqlstate="40002"),
        Driver(sqlstate="40001"),
        DBAPIError("", {}, Exception()),
    ],
)
def test_other_database_errors_count(error: Exception) -> None:
    outcome = end(error)

    assert isinstance(outcome, RetryAfter)
    assert outcome.counts


def test_transient_errors_count_from_the_limit_on() -> None:
    error = database(sqlstate="40001")

    before, after = (end(error, transient=count) for count in (TRANSIENT_LIMIT - 1, TRANSIENT_LIMIT))

    assert isinstance(before, RetryAfter)
    assert isinstance(after, RetryAfter)
    assert (before.counts, after.counts) == (False, True)
    assert TRANSIENT_LIMIT == 20
    assert end(error, failures=2, transient=TRANSIENT_LIMIT) == Failed(ErrorText.of(error))


# --- what a job raises


@pytest.mark.parametrize("signal", [Retry, Snooze])
@pytest.mark.parametrize("delay", [-1, math.nan, math.inf, timedelta(seconds=-1), timedelta.max])
def test_a_signal_refuses_a_delay_out_of_range(signal: Any, delay: float | timedelta) -> None:
    with pytest.raises(ValueError, match="delay must be"):
        signal(delay)


@pytest.mark.parametrize("signal", [Retry(), Retry(5), Snooze(5), Cancel(), Cancel("why"), Fail("why")])
def test_signals_are_one_family_and_survive_pickle(signal: JobSignal) -> None:
    again = pickle.loads(pickle.dumps(signal))

    assert isinstance(signal, JobSignal)
    assert isinstance(signal, Exception)
    assert vars(again) == vars(signal)


@pytest.mark.parametrize(
    ("signal", "text"),
    [
        (Retry(), "the job asked for another attempt"),
        (Retry(60), "the job asked for another attempt in 0:01:00"),
        (Snooze(60), "the job asked to run again in 0:01:00"),
        (Cancel(), ""),
        (Cancel("why"), "why"),
        (Fail("why"), "why"),
    ],
)
def test_a_signal_says_what_was_asked(signal: JobSignal, text: str) -> None:
    assert str(signal) == text


# --- errors as text


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


def test_an_error_is_told_by_type_message_and_traceback() -> None:
    text = ErrorText.of(raised(ValueError("no such invoice")))

    assert (text.type, text.message) == ("ValueError", "no such invoice")
    assert "in raised" in text.traceback
    assert text.traceback.endswith("ValueError: no such invoice\n")
    assert ErrorText.of(Unspeakable()).type == f"{__name__}.Unspeakable"


def test_an_error_that_cannot_be_shown_has_a_text_all_the_same() -> None:
    text = ErrorText.of(raised(Unspeakable()))

    assert text.message == "<cannot be shown: ZeroDivisionError>"
    assert "in raised" in text.traceback


def test_a_type_with_a_hostile_name_has_a_text_all_the_same() -> None:
    class Meta(type):
        @property
        def __module__(cls) -> str:  # type: ignore[override]
            raise RecursionError

    text = ErrorText.of(Meta("Odd", (Exception,), {})("words"))

    assert text.type == "<cannot be shown: RecursionError>"
    assert text.message == "words"


def test_long_texts_are_cut_in_the_middle() -> None:
    long = type("L" * 9_000, (Exception,), {})
    text = ErrorText.of(raised(long("start" + "x" * 90_000 + "end")))

    assert [len(text.type), len(text.message), len(text.traceback)] == [TYPE_LIMIT, MESSAGE_LIMIT, TRACEBACK_LIMIT]
    assert (MESSAGE_LIMIT, TRACEBACK_LIMIT) == (2_000, 20_000)
    assert text.message.startswith("start")
    assert text.message.endswith("xend")


@given(
    st.text(st.characters(), max_size=300) | st.text(st.sampled_from("\0\ud800\udfffa"), max_size=300),
    st.integers(60, 200),
)
def test_any_text_becomes_storable(text: str, limit: int) -> None:
    stored = storable_text(text, limit)

    stored.encode("utf-8")
    assert "\0" not in stored
    assert len(stored) <= limit


@given(st.integers(1, 5_000), st.integers(60, 1_000))
def test_a_cut_says_how_many_characters_are_gone(length: int, limit: int) -> None:
    text = "".join(chr(0x4E00 + number) for number in range(length))
    stored = storable_text(text, limit)

    kept = sum(character >= "\u4e00" for character in stored)
    if length <= limit:
        assert stored == text
    else:
        assert f"[{length - kept:,} characters cut]" in stored


def test_what_is_escaped_stays_visible() -> None:
    assert storable_text("a\0b\ud83dc😀\n", 100) == "a\\x00b\\ud83dc😀\n"


def test_the_text_of_a_group_says_what_its_first_error_says() -> None:
    error = ExceptionGroup("of a TaskGroup", [ExceptionGroup("inner", [ValueError("no such invoice")]), KeyError(1)])

    text = ErrorText.of(error)

    assert text.message == "of a TaskGroup (2 sub-exceptions): ValueError: no such invoice"
