"""A listener that raises on every event, whatever it raises, in both threads of a worker that works."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.life import jobs_for_tests as jobs
from tests.processes import workers
from tests.support import a_worker, until
from worker.core.context import JobContext
from worker.core.registry import Registry
from worker.flow.job import JobFunction
from worker.observe import events, logs
from worker.observe.events import Event, HintLeftAlone, RedisBack, emit
from worker.settings import Settings


class Alarm(BaseException):
    """What no library expects."""


RAISED = [RuntimeError, SystemExit, asyncio.CancelledError, GeneratorExit, Alarm]


@contextmanager
def listening(listener: events.Listener) -> Iterator[None]:
    stop = events.listen(listener)
    try:
        yield
    finally:
        stop()


@contextmanager
def configured(style: Literal["text", "json"]) -> Iterator[None]:
    """Logging as a worker has it, while the block lasts."""
    root, listeners = logging.getLogger(), list(events._listeners)
    handlers = list(root.handlers)
    levels = {logger: logger.level for logger in (root, *map(logging.getLogger, logs._QUIET_BELOW_WARNING))}
    try:
        logs.configure("info", style)
        yield
    finally:
        root.handlers[:], events._listeners[:] = handlers, listeners
        for logger, level in levels.items():
            logger.setLevel(level)
        structlog.reset_defaults()


def raising(error: type[BaseException], in_thread_only: bool = False) -> events.Listener:
    def listener(_event: Event) -> None:
        if not in_thread_only or threading.current_thread() is not threading.main_thread():
            raise error

    return listener


async def fails(ctx: JobContext) -> None:
    """Fail the first attempt."""
    if ctx.attempt == 1:
        raise ValueError("not yet")


def registry() -> Registry:
    made = jobs.registry()
    made.register(JobFunction(fails, name="tests.fails"))
    return made


@pytest.mark.parametrize("error", RAISED)
def test_whatever_a_listener_raises_is_reported_and_the_others_are_told(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Event] = []

    with listening(raising(error)), listening(told.append):
        emit(RedisBack())

    assert told == [RedisBack()]
    assert error.__name__ in caplog.text


def test_a_person_who_presses_ctrl_c_is_heard_wherever_the_program_is() -> None:
    with listening(raising(KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
        emit(RedisBack())


def test_in_a_thread_no_interrupt_is_a_persons() -> None:
    left: list[BaseException] = []

    def in_thread() -> None:
        try:
            emit(RedisBack())
        except BaseException as error:
            left.append(error)

    with listening(raising(KeyboardInterrupt)):
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()

    assert left == []


def test_a_log_that_cannot_be_written_stops_nobody_either(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("no space left on device")

    told: list[Event] = []
    monkeypatch.setattr(logging.getLogger("exarq"), "handlers", [Full()])

    with listening(raising(RuntimeError)), listening(told.append):
        emit(RedisBack())

    assert told == [RedisBack()]


def test_a_line_of_the_log_stays_short_whatever_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    begin, end = "begin " + "x" * 1_000_000, "x" * 1_000_000 + " end"

    with configured("json"):
        emit(HintLeftAlone(hint=begin + end, owner="plain ARQ"))

    line = json.loads(capsys.readouterr().err)
    assert line["hint"].startswith("begin x")
    assert line["hint"].endswith("x end")
    assert "[1,996,010 characters cut]" in line["hint"]
    assert len(line["hint"]) < 5_000


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_listener_that_fails_is_logged_with_its_traceback_and_without_its_variables(
    style: Literal["text", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_event: Event) -> None:
        password = "hunter2".upper()
        raise ValueError(f"length {len(password)}")

    with configured(style), listening(fails):
        emit(RedisBack())

    said = capsys.readouterr().err
    assert "an event listener failed on RedisBack" in said
    assert "ValueError: length 7" in said
    assert "HUNTER2" not in said


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, KeyboardInterrupt])
async def test_a_worker_whose_listener_raises_on_every_event_works_beats_and_stops_as_any_other(
    error: type[BaseException], engine: AsyncEngine, sessions: async_sessionmaker[AsyncSession], settings: Settings
) -> None:
    await jobs.make_effects(engine)
    heard_in: set[str] = set()

    with (
        listening(raising(error, in_thread_only=error is KeyboardInterrupt)),
        listening(lambda _: heard_in.add(threading.current_thread().name)),
    ):
        async with a_worker(settings, registry()):
            (before,) = await until(lambda: workers(engine), "the worker beats")
            await jobs.enqueue_all(sessions, jobs.note.call("first"), JobFunction(fails, name="tests.fails").call())
            await until(lambda: _all_succeeded(engine, 2), "both jobs succeed")

            async with engine.begin() as connection:
                await connection.execute(text("DELETE FROM exarq.worker"))  # its thread tells of it
            (after,) = await until(lambda: workers(engine), "the worker beats under a new id")
            await jobs.enqueue_all(sessions, jobs.note.call("second"))
            await until(lambda: _all_succeeded(engine, 3), "jobs go on")

    assert before != after
    assert heard_in >= {"MainThread", "exarq heartbeat"}
    assert await jobs.effects(engine) == ["first", "second"]
    assert await workers(engine) == []


async def _all_succeeded(engine: AsyncEngine, count: int) -> bool:
    return await jobs.states(engine) == {"succeeded": count}
