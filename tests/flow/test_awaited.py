"""What a worker remembers of those that wait: enough to tell them, and never more than it can look through."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from worker.broker.messages import EndAwaited, Ended
from worker.flow import awaited
from worker.flow.awaited import Awaited

HERE = uuid4()


@pytest.fixture
def told() -> list[Ended]:
    return []


@pytest.fixture
def waits(told: list[Ended], monkeypatch: pytest.MonkeyPatch) -> Awaited:
    monkeypatch.setattr(awaited, "_MOST", 3)
    monkeypatch.setattr(awaited, "_REMEMBERED", 2)
    return Awaited(told.extend)


def hear(waits: Awaited, job: UUID, waiters: Iterable[UUID]) -> None:
    for waiter in waiters:
        waits.heard(EndAwaited(job, waiter, HERE))


def test_every_waiter_of_a_job_is_told_once(waits: Awaited, told: list[Ended]) -> None:
    job, waiters = uuid4(), [uuid4(), uuid4()]
    hear(waits, job, [*waiters, *waiters])

    waits.ended(job)
    waits.ended(job)

    assert told == [Ended(job, waiter) for waiter in waiters]


def test_who_asks_just_after_the_end_is_told_at_once(waits: Awaited, told: list[Ended]) -> None:
    long_ago, *lately = (uuid4() for _ in range(3))
    for job in (long_ago, *lately):
        waits.ended(job)
    waiter = uuid4()

    for job in (long_ago, *lately):
        hear(waits, job, [waiter])

    assert told == [Ended(job, waiter) for job in lately]


def test_more_waiters_than_it_can_remember_are_left_to_their_own_looks_be_they_of_one_job(
    waits: Awaited, told: list[Ended]
) -> None:
    job, waiters = uuid4(), [uuid4() for _ in range(5)]
    hear(waits, job, waiters)

    waits.ended(job)
    hear(waits, other := uuid4(), waiters[:1])
    waits.ended(other)

    assert told == [*(Ended(job, waiter) for waiter in waiters[:3]), Ended(other, waiters[0])]


def test_who_no_longer_says_that_they_wait_makes_room_although_others_of_the_same_job_do(
    waits: Awaited, told: list[Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, gone, there = uuid4(), [uuid4(), uuid4()], [uuid4(), uuid4(), uuid4()]
    monkeypatch.setattr(awaited, "_BELIEVED_FOR", timedelta(0))
    hear(waits, job, gone)
    monkeypatch.setattr(awaited, "_BELIEVED_FOR", timedelta(seconds=1000))
    waits._purged -= 1000
    hear(waits, job, there)

    waits.ended(job)

    assert told == [Ended(job, waiter) for waiter in there]
