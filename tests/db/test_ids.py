"""Ids drawn in Python: unique, version 7, in the order of their milliseconds."""

from __future__ import annotations

import time
from uuid import RFC_4122

import pytest

from worker.db.ids import adopted_id, is_adopted, uuid7, uuid7s


def test_an_id_says_that_it_is_a_version_7_uuid() -> None:
    drawn = [uuid7() for _ in range(1000)]

    assert {(one.version, one.variant) for one in drawn} == {(7, RFC_4122)}


def test_an_adopted_jobs_id_sorts_among_the_others_and_is_told_from_them() -> None:
    before, drawn, after = uuid7(), [adopted_id() for _ in range(1000)], uuid7()

    assert {(one.version, one.variant, is_adopted(one)) for one in drawn} == {(8, RFC_4122, True)}
    assert all(before.int >> 80 <= one.int >> 80 <= after.int >> 80 for one in drawn)
    assert not is_adopted(before)


def test_an_id_begins_with_the_millisecond_it_was_made_in() -> None:
    before = time.time_ns() // 1_000_000
    drawn = uuid7()
    after = time.time_ns() // 1_000_000

    assert before <= drawn.int >> 80 <= after


def test_ids_of_later_milliseconds_sort_later(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for millisecond in range(1_700_000_000_000, 1_700_000_000_500):
        monkeypatch.setattr(time, "time_ns", lambda ms=millisecond: ms * 1_000_000)
        drawn.append(uuid7())

    assert drawn == sorted(drawn)
    assert [str(one) for one in drawn] == sorted(str(one) for one in drawn)


def test_ids_that_are_drawn_together_are_in_order() -> None:
    drawn = uuid7s(1000)

    assert drawn == sorted(drawn)
    assert [str(one) for one in drawn] == sorted(str(one) for one in drawn)


def test_ids_of_one_millisecond_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)

    drawn = {uuid7() for _ in range(10_000)}

    assert len(drawn) == 10_000
