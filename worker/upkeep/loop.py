"""A loop is a step and an interval; the step is what is tested, the loop is written once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

from worker.observe.events import StepFailed, emit

Step = Callable[[], Awaitable[timedelta | None]]
"""Does one step's work and says how long to wait; None takes the loop's interval."""


async def every(interval: timedelta, name: str, step: Step, stop: asyncio.Event) -> None:
    """Call `step` until `stop`: after as long as it says, else after `interval`; its errors are told, not raised."""
    while not stop.is_set():
        wait = await _tried(name, step)
        await sleep_unless(stop, interval if wait is None else wait)


async def when_called(called: asyncio.Event, name: str, step: Step, stop: asyncio.Event) -> None:
    """Call `step` until `stop`: whenever it is `called` for, and after as long as it says."""
    stopped = asyncio.ensure_future(stop.wait())
    wait: timedelta | None = None
    try:
        while not stop.is_set():
            asked = asyncio.ensure_future(called.wait())
            rest = None if wait is None else wait.total_seconds()
            try:
                await asyncio.wait({asked, stopped}, timeout=rest, return_when=asyncio.FIRST_COMPLETED)
            finally:
                asked.cancel()
            called.clear()
            if not stop.is_set():
                wait = await _tried(name, step)
    finally:
        stopped.cancel()


async def _tried(name: str, step: Step) -> timedelta | None:
    try:
        return await step()
    except Exception as error:
        emit(StepFailed(step=name, error=f"{type(error).__name__}: {error}"))
        return None


async def sleep_unless(stop: asyncio.Event, duration: timedelta) -> None:
    """Wait for `duration`, or until `stop` is set."""
    try:
        async with asyncio.timeout(duration.total_seconds()):
            await stop.wait()
    except TimeoutError:
        return
