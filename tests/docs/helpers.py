"""The examples run as their readers run them: by the commands that they name, in their folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests import warm
from tests.support import until
from tests.warm import Forked, Place

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FASTAPI = EXAMPLES / "fastapi_service"


def environment(database_url: str, redis_url: str, modules: str | None = None) -> dict[str, str]:
    """A shell's environment in which `exarq`, `uvicorn` and `python` are this environment's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EXARQ_")}
    addresses = {"EXARQ_DATABASE_URL": database_url, "EXARQ_REDIS_URL": redis_url}
    jobs = {} if modules is None else {"EXARQ_JOBS_MODULES": modules}
    return {**kept, **addresses, **jobs, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


class Started:
    """A process and what it has written."""

    def __init__(self, process: subprocess.Popen[bytes] | Forked, log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def output(self) -> str:
        """All of it so far."""
        return self._log.read_text(errors="replace")

    def has_said(self, what: str) -> bool:
        """Whether it has written this; fails when it ended before."""
        assert self._process.poll() is None or what in self.output, self.output[-4000:]
        return what in self.output


@asynccontextmanager
async def started(
    command: list[str],
    log: Path,
    environment: dict[str, str],
    *,
    ready: str,
    folder: Path = FASTAPI,
    cold: bool = False,
) -> AsyncIterator[Started]:
    """A process that has said that it is ready, ended by SIGTERM in order; a cold one is started as by a shell."""
    process = (_start if cold else _fork)(command, log, environment, folder)
    running = Started(process, log)
    try:
        await until(lambda: running.has_said(ready), f"{command[0]} is ready", 120)
        yield running
        process.send_signal(signal.SIGTERM)
        await until(lambda: process.poll() is not None, f"{command[0]} ends", 60)
        assert process.poll() in (0, -signal.SIGTERM), running.output[-4000:]  # uvicorn closes, then ends by it
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def _start(command: list[str], log: Path, environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)


def _fork(command: list[str], log: Path, environment: dict[str, str], folder: Path) -> Forked:
    log.touch()
    module = {"exarq": "worker"}.get(command[0], command[0])
    return Forked(Place(folder, environment, Path(os.devnull), log, log), warm.module, module, *command[1:])
