"""Who is dead, by one watcher's clock: a table of looks, each a moment and the beats that were seen."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from worker.core.watch import Watch

A, B = uuid4(), uuid4()
Look = tuple[float, Mapping[UUID, int | None]]


def dead_at_the_end(*looks: Look) -> dict[UUID, int | None]:
    watch = Watch(lease=timedelta(seconds=10), longest_gap=timedelta(seconds=4))
    found: dict[UUID, int | None] = {}
    for now, beats in looks:
        found = watch.look(beats, now)
    return found


@pytest.mark.parametrize(
    ("looks", "dead"),
    [
        ([(0, {A: 1})], {}),
        ([(0, {A: 1}), (3, {A: 1}), (6, {A: 1}), (9, {A: 1}), (9.9, {A: 1})], {}),
        ([(0, {A: 1}), (3, {A: 1}), (6, {A: 1}), (9, {A: 1}), (10, {A: 1})], {A: 1}),
        ([(0, {A: 1}), (3, {A: 2}), (6, {A: 2}), (9, {A: 2}), (12, {A: 2})], {}),
        ([(0, {A: 1}), (3, {A: 2}), (6, {A: 2}), (9, {A: 2}), (13, {A: 2})], {A: 2}),
        ([(0, {A: 1}), (3, {A: 1}), (6, {A: 1}), (9, {A: 1}), (10, {A: 2})], {}),
        ([(0, {A: 1}), (4, {A: 1}), (8, {A: 1}), (12, {A: 1})], {A: 1}),
        ([(0, {A: 1}), (4, {A: 1}), (8, {A: 1}), (12.1, {A: 1})], {}),
        ([(0, {A: 1}), (60, {A: 1})], {}),
        ([(0, {A: 1}), (60, {A: 1}), (64, {A: 1}), (68, {A: 1}), (70, {A: 1})], {A: 1}),
        ([(0, {A: None}), (4, {A: None}), (8, {A: None}), (10, {A: None})], {A: None}),
        ([(0, {A: None}), (4, {A: 0}), (8, {A: 0}), (10, {A: 0})], {}),
        ([(0, {A: 1}), (4, {}), (8, {A: 1}), (10, {A: 1})], {}),
        ([(0, {A: 1, B: 1}), (4, {A: 1, B: 2}), (8, {A: 1, B: 3}), (10, {A: 1, B: 3})], {A: 1}),
    ],
    ids=[
        "nobody at first sight",
        "nobody before the lease is over",
        "who was silent for a whole lease",
        "a beat begins a new lease",
        "silence after a beat counts from where it was seen",
        "a beat at the last moment saves",
        "gaps of the longest length are no gaps",
        "nobody after a gap",
        "nobody after a minute without looking",
        "a whole lease after the gap",
        "an id that has running jobs and no row",
        "a row that appears is a sign of life",
        "who vanished and came back begins anew",
        "one does not hide the other",
    ],
)
def test_the_watch_convicts(looks: list[Look], dead: dict[UUID, int | None]) -> None:
    assert dead_at_the_end(*looks) == dead


def test_the_watch_forgets_workers_that_vanished() -> None:
    watch = Watch(lease=timedelta(seconds=10), longest_gap=timedelta(seconds=4))
    watch.look({A: 1, B: 1}, 0)

    watch.look({B: 2}, 1)

    assert set(watch._since) == {B}


def test_the_next_conviction_is_the_earliest_end_of_a_lease() -> None:
    watch = Watch(lease=timedelta(seconds=10), longest_gap=timedelta(seconds=4))

    assert watch.next_conviction(0) is None
    watch.look({A: 1, B: 1}, 0)
    watch.look({A: 1, B: 2}, 3)
    assert watch.next_conviction(4) == timedelta(seconds=6)
    assert watch.next_conviction(10.5) == timedelta(seconds=2.5)  # A is dead already
