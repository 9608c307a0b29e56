"""A loop is a step and an interval."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

from tests.support import heard, until
from worker.observe.events import StepFailed
from worker.upkeep.loop import every, sleep_unless, when_called

HOUR = timedelta(hours=1)


async def test_a_step_that_finds_work_is_called_again_as_soon_as_it_says() -> None:
    stop = asyncio.Event()
    calls = 0

    async def step() -> timedelta | None:
        nonlocal calls
        calls += 1
        return timedelta(0) if calls < 50 else None

    loop = asyncio.create_task(every(HOUR, "step", step, stop))
    await until(lambda: calls == 50, "the step has no more work")
    stop.set()
    await loop

    assert calls == 50


async def test_a_step_without_a_wish_waits_for_the_interval() -> None:
    stop = asyncio.Event()
    called: list[float] = []

    async def step() -> timedelta | None:
        called.append(time.monotonic())
        return None

    loop = asyncio.create_task(every(timedelta(milliseconds=50), "step", step, stop))
    await until(lambda: len(called) >= 3, "three calls")
    stop.set()
    await loop

    assert called[2] - called[0] >= 0.099


async def test_a_step_is_called_when_it_is_called_for_and_again_until_it_has_no_more_wish() -> None:
    called, stop, calls = asyncio.Event(), asyncio.Event(), 0

    async def step() -> timedelta | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("once")
        return timedelta(0) if calls % 10 else None

    async with heard() as events:
        loop = asyncio.create_task(when_called(called, "step", step, stop))
        await asyncio.sleep(0)
        uncalled = calls
        called.set()
        await until(lambda: calls == 1 and not called.is_set(), "the step has failed")
        called.set()
        await until(lambda: calls == 10, "the step has no more work")
        called.set()
        await until(lambda: calls == 20, "the step was called for once more")
        stop.set()
        await loop

    assert uncalled == 0
    assert [type(event) for event in events] == [StepFailed]


async def test_a_step_that_wishes_to_rest_is_called_when_it_is_called_for_meanwhile() -> None:
    called, stop, calls = asyncio.Event(), asyncio.Event(), 0

    async def step() -> timedelta | None:
        nonlocal calls
        calls += 1
        return HOUR

    loop = asyncio.create_task(when_called(called, "step", step, stop))
    called.set()
    await until(lambda: calls == 1, "the step was called")
    called.set()
    await until(lambda: calls == 2, "the step was called while it rests")
    stop.set()
    await loop


async def test_an_error_is_told_and_the_loop_goes_on() -> None:
    stop = asyncio.Event()
    calls = 0

    async def step() -> timedelta | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("once")
        stop.set()
        return None

    async with heard() as events:
        await every(timedelta(milliseconds=1), "step", step, stop)

    assert events == [StepFailed(step="step", error="RuntimeError: once")]
    assert calls == 2


async def test_a_stop_ends_the_wait() -> None:
    stop = asyncio.Event()

    async def step() -> timedelta | None:
        asyncio.get_running_loop().call_later(0.01, stop.set)
        return None

    async with asyncio.timeout(30):
        await every(HOUR, "step", step, stop)


async def test_a_loop_that_was_stopped_before_calls_nothing() -> None:
    stop = asyncio.Event()
    stop.set()

    async def step() -> timedelta | None:
        raise AssertionError("called")

    async with heard() as events:
        await every(HOUR, "step", step, stop)

    assert events == []


async def test_a_sleep_lasts_as_long_as_it_should_when_nobody_stops_it() -> None:
    began = time.monotonic()

    await sleep_unless(asyncio.Event(), timedelta(milliseconds=60))

    assert 0.059 <= time.monotonic() - began < 30
