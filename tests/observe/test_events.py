"""The flow says what happened; whoever listens cannot stop it."""

from __future__ import annotations

import logging

import pytest

from worker.observe import events
from worker.observe.events import Event, RedisBack, StepFailed, emit


def test_a_listener_hears_every_event_until_it_stops() -> None:
    told: list[Event] = []
    stop = events.listen(told.append)

    emit(RedisBack())
    stop()
    emit(RedisBack())

    assert told == [RedisBack()]


def test_a_listener_that_raises_is_reported_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Event] = []

    def fail(_event: Event) -> None:
        raise RuntimeError("deaf")

    stops = [events.listen(fail), events.listen(told.append)]
    with caplog.at_level(logging.ERROR, "exarq"):
        emit(StepFailed(step="a", error="b"))
    for stop in stops:
        stop()

    assert told == [StepFailed(step="a", error="b")]
    assert "RedisBack" not in caplog.text
    assert "failed on StepFailed" in caplog.text


def test_a_listener_that_leaves_while_it_is_told_keeps_no_other_from_hearing() -> None:
    told: list[Event] = []

    def once(_event: Event) -> None:
        leave()

    leave = events.listen(once)
    stop = events.listen(told.append)
    emit(RedisBack())
    stop()

    assert told == [RedisBack()]


def test_every_event_has_a_text_of_its_own() -> None:
    texts = {kind.__name__: kind.text for kind in Event.__subclasses__()}

    assert len(texts) > 15
    assert all(texts.values())
    assert len(set(texts.values())) == len(texts)
