"""Signals that come when the worker has stopped already, or has been told by somebody else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.life.jobs_for_tests import LINES
from tests.processes import worker_process, workers
from tests.support import until
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
