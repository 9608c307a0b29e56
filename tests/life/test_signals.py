"""Signals that come when the worker has stopped already, or has been told by somebody else."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.flow.helpers import NAME, registry_of
from tests.life.jobs_for_tests import LINES
from tests.processes import worker_process, workers
from tests.support import a_job, heard, state, until
from worker.core.context import JobContext
from worker.observe.events import WorkerStopping
from worker.process import Worker
from worker.settings import Settings

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


def closing(ctx: dict[Any, Any]) -> None:
    """A shutdown hook that returns when the test has sent its second signal."""
    lines = Path(os.environ[LINES])
    lines.write_text("closing")
    while lines.read_text() != "go on":
        time.sleep(0.01)
    lines.write_text("closed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_leaves_the_shutdown_hook_its_time(
    number: signal.Signals, engine: AsyncEngine, settings: Settings, tmp_path: Path
) -> None:
    lines = tmp_path / "lines"
    lines.touch()
    async with worker_process(settings, engine, lines=lines, jobs_on_shutdown=f"{__name__}:closing") as worker:
        worker.send(number)
        await until(lambda: lines.read_text() == "closing", "the shutdown hook runs")

        worker.send(number)
        lines.write_text("go on")

        assert await worker.ended() == 0
    assert lines.read_text() == "closed"
    assert await workers(engine) == []


async def test_an_order_and_then_one_signal_leave_a_job_its_grace(engine: AsyncEngine, settings: Settings) -> None:
    async def waits(ctx: JobContext) -> None:
        begun.set()
        await may_end.wait()

    begun, may_end = asyncio.Event(), asyncio.Event()
    long = settings.worker.model_copy(update={"grace": timedelta(seconds=60)})
    stops: list[Callable[[bool], None]] = []
    worker = Worker(settings.model_copy(update={"worker": long}), registry=registry_of(waits), obey=stops.append)
    job_id = await a_job(engine, name=NAME)
    async with heard() as told:
        running = asyncio.create_task(worker.main())
        try:
            await begun.wait()

            stops[0](False)
            await until(lambda: any(isinstance(event, WorkerStopping) for event in told), "it has stopped claiming")
            os.kill(os.getpid(), signal.SIGTERM)
            last = await _beat(engine)
            await until(lambda: _beats_after(engine, last + 2), "the signal has had its time")
            may_end.set()
            await running
        finally:
            await worker.close()
    assert await state(engine, job_id) == "succeeded"


async def _beat(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.exec_driver_sql("SELECT max(beat) FROM exarq.worker")).scalar() or 0)


async def _beats_after(engine: AsyncEngine, beat: int) -> bool:
    return await _beat(engine) > beat
