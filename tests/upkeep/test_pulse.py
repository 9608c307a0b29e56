"""Who holds the event loop is seen from another thread, told and charged."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from tests.flow.helpers import a_work_with, claimed, start
from tests.support import a_job, attempts, heard, until
from worker.core import remarks
from worker.flow.work import Work
from worker.observe.events import AttemptEnded, Event, LoopBlocked
from worker.settings import Settings
from worker.upkeep.pulse import Pulse


@contextmanager
def looked_at(work: Work) -> Iterator[Pulse]:
    """Another thread looks at this loop, without a pause."""
    pulse, ended = Pulse(asyncio.get_running_loop(), work.holdings), threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            pulse.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield pulse
    finally:
        ended.set()
        thread.join()


async def run_blocking(work: Work, engine: AsyncEngine) -> tuple[AttemptEnded, list[Event], list[Any]]:
    (run,) = await claimed(work, await a_job(engine, name="tests.job"))
    async with heard() as told:
        with looked_at(work):
            task = start(work, run)
            task.set_name("the job")
            await task
            await work.flusher.drain()
    [ended] = [event for event in told if isinstance(event, AttemptEnded)]
    return ended, told, await attempts(engine, run.claimed.held.job_id)


async def async_job(session: AsyncSession) -> None:
    time.sleep(3)  # noqa: ASYNC251 — what this test is about


def sync_job(session: Session) -> None:
    time.sleep(3)


async def uses_its_session(session: AsyncSession) -> None:
    await session.connection()
    time.sleep(3)  # noqa: ASYNC251 — what this test is about


@pytest.mark.parametrize("fn", [async_job, sync_job, uses_its_session])
async def test_a_job_is_charged_for_the_loop_it_held(
    engine: AsyncEngine, settings: Settings, fn: Callable[..., object]
) -> None:
    async with a_work_with(settings, fn) as work:
        ended, told, [noted] = await run_blocking(work, engine)

    assert ended.outcome == noted.ending == "succeeded"
    assert ended.blocked == pytest.approx(noted.blocked.total_seconds())
    assert ended.blocked is not None
    assert 1.0 <= ended.blocked <= ended.seconds
    assert {event.task for event in told if isinstance(event, LoopBlocked)} == {"the job"}


async def test_a_job_that_waits_is_charged_nothing(engine: AsyncEngine, settings: Settings) -> None:
    waits, gate = asyncio.Event(), asyncio.Event()

    async def fn(session: AsyncSession) -> None:
        waits.set()
        await gate.wait()

    async with a_work_with(settings, fn) as work:
        (run,) = await claimed(work, await a_job(engine, name="tests.job"))
        task = start(work, run)
        await waits.wait()
        with looked_at(work) as pulse:
            for _ in range(5):
                before = pulse._looked
                await until(lambda: pulse._looked > before, "it was looked at")  # noqa: B023 — asked at once
        gate.set()
        await task
        await work.flusher.drain()

    assert run.remarks is remarks.NOTHING
