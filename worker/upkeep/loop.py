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
        wait: timedelta | None = None
        try:
            wait = await step()
        except Exception as error:
            emit(StepFailed(step=name, error=f"{type(error).__name__}: {error}"))
        await sleep_unless(stop, interval if wait is None else wait)


async def sleep_unless(stop: asyncio.Event, duration: timedelta) -> None:
    """Wait for `duration`, or until `stop` is set."""
    try:
        async with asyncio.timeout(duration.total_seconds()):
            await stop.wait()
    except TimeoutError:
        return
