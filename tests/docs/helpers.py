"""The examples run as their readers run them: by the commands that they name, in their folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support import until

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FASTAPI = EXAMPLES / "fastapi_service"


def environment(database_url: str, redis_url: str, modules: str) -> dict[str, str]:
    """A shell's environment in which `exarq`, `uvicorn` and `python` are this environment's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EXARQ_")}
    addresses = {"EXARQ_DATABASE_URL": database_url, "EXARQ_REDIS_URL": redis_url, "EXARQ_JOBS_MODULES": modules}
    return {**kept, **addresses, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


class Started:
    """A process and what it has written."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
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
async def started(command: list[str], log: Path, environment: dict[str, str], *, ready: str) -> AsyncIterator[Started]:
    """A process that has said that it is ready, ended by SIGTERM in order."""
    process = _start(command, log, environment)
    running = Started(process, log)
    try:
        await until(lambda: running.has_said(ready), f"{command[0]} is ready", 120)
        yield running
        process.terminate()
        await until(lambda: process.poll() is not None, f"{command[0]} ends", 60)
        assert process.returncode in (0, -signal.SIGTERM), running.output[-4000:]  # uvicorn closes, then ends by it
    finally:
        process.kill()
        process.wait()


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=FASTAPI, env=environment, stdout=out, stderr=out)
