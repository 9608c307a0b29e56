"""Workers in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.life.jobs_for_tests import LINES
from tests.support import until
from tests.warm import Forked, Place
from worker.settings import Settings

_ROOT = Path(__file__).parent.parent
_TO_BEGIN = 120.0  # a loaded machine needs seconds for a process; the tests' own limits begin after it


class WorkerProcess:
    """One worker in a process of its own."""

    def __init__(self, process: Forked, log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it has logged so far, one record for each event."""
        written = self._log.read_text().splitlines()
        return [json.loads(line) for line in written if line.startswith("{") and line.endswith("}")]

    @property
    def output(self) -> str:
        """All it has written, for the message of an assertion."""
        return self._log.read_text()[-4000:]

    def said(self, what: str) -> list[dict[str, Any]]:
        """The events whose text contains `what`."""
        return [event for event in self.events if what in str(event["event"])]

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        if not self.is_over:
            self._process.send_signal(number)

    async def ended(self, limit: float = 90.0) -> int:
        """Wait for its end and return the exit code."""
        await until(lambda: self.is_over, "the worker process ends", limit)
        code = self._process.poll()
        assert code is not None
        return code

    def reap(self) -> None:
        """End it in any case."""
        self.send(signal.SIGKILL)
        self._process.wait()


@asynccontextmanager
async def worker_process(
    settings: Settings, engine: AsyncEngine, *, lines: Path | None = None, registered: bool = True, **more: object
) -> AsyncIterator[WorkerProcess]:
    """A worker of these settings that has started; `more` are variables such as `worker_grace=1`."""
    before = await workers(engine) if registered else []
    with tempfile.TemporaryDirectory() as folder:
        process = _start(Path(folder, "log"), _environment(settings, lines, more), _work)
        try:
            if registered:
                await until(lambda: _has_begun(process, engine, before), "the worker process begins to beat", _TO_BEGIN)
            yield process
            process.send(signal.SIGTERM)
            await process.ended()
        finally:
            process.reap()


@asynccontextmanager
async def parent_process(
    settings: Settings, engine: AsyncEngine, *, processes: int = 2, lines: Path | None = None, **more: object
) -> AsyncIterator[WorkerProcess]:
    """`exarq run --processes` whose workers have begun; their pids are in `exarq.worker`."""
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(settings, lines, {"worker_processes": processes, **more})
        parent = _start(Path(folder, "log"), environment, _supervise)
        try:
            await until(lambda: _all_have_begun(parent, engine, processes), "the processes begin to beat", _TO_BEGIN)
            yield parent
            parent.send(signal.SIGTERM)
            await parent.ended()
        finally:
            parent.reap()  # its processes end with it


def _start(log: Path, environment: dict[str, str], function: Callable[[], None]) -> WorkerProcess:
    log.touch()
    return WorkerProcess(Forked(Place(_ROOT, environment, Path(os.devnull), log, log), function), log)


def _supervise() -> None:
    from worker.cli.run import run_until_stopped

    run_until_stopped(burst=False, concurrency=None, queues=None)


def _work() -> None:
    from worker.observe.logs import configure
    from worker.process import leave_threads_behind, run_worker
    from worker.settings import load_settings

    settings = load_settings()
    configure("info", "json")
    run_worker(settings)
    leave_threads_behind()


async def workers(engine: AsyncEngine) -> list[Any]:
    """The ids of the workers that have beaten."""
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT id FROM exarq.worker WHERE beat > 0"))).scalars())


async def _has_begun(process: WorkerProcess, engine: AsyncEngine, before: list[Any]) -> bool:
    assert not process.is_over, f"the worker did not start:\n{process.output}"
    return bool(set(await workers(engine)) - set(before))


async def _all_have_begun(parent: WorkerProcess, engine: AsyncEngine, processes: int) -> bool:
    assert not parent.is_over, f"the parent ended:\n{parent.output}"
    return len(await workers(engine)) == processes


def _environment(settings: Settings, lines: Path | None, more: dict[str, object]) -> dict[str, str]:
    worker = settings.worker
    ours: dict[str, object] = {
        "database_url": settings.database.url,
        **({"database_pooler": settings.database.pooler} if settings.database.pooler else {}),
        "redis_url": settings.redis.url,
        "redis_timeout": settings.redis.timeout.total_seconds(),
        "jobs_modules": "tests.life.jobs_for_tests",
        "jobs_first_wait": 0.05,
        "jobs_longest_wait": 0.2,
        "worker_concurrency": worker.concurrency,
        **{f"worker_{name}": getattr(worker, name).total_seconds() for name in ("lease", "beat", "sweep", "grace")},
        **more,
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EXARQ_")}
    variables = {f"EXARQ_{name.upper()}": str(value) for name, value in ours.items()}
    return {**inherited, **variables, **({LINES: str(lines)} if lines else {})}
