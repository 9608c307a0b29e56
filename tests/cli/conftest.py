"""The real command, in a folder of the test's own, against the servers of the test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.warm import Forked, Place

JOBS = """
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from worker import JobContext, job

@job
async def charge(session: AsyncSession, invoice_id: int, memo: str = "") -> dict[str, int]:
    await session.execute(text("SELECT 1"))
    return {"paid": invoice_id}

@job(max_attempts=1)
async def broken(ctx: JobContext, word: str) -> None:
    raise ValueError(f"cannot [red]{word}[/red]")
"""


_LIMIT = 120  # for one command; a loaded machine needs many seconds to start an interpreter


@dataclass
class Ended:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error, which ends with 2 and prints no data."""
        assert self.code == 2, self
        assert self.out == "", self
        (line,) = self.err.splitlines()
        assert line.startswith("exarq: "), line
        return line


@dataclass
class Command:
    """`exarq` in one folder with one environment: calling it forks a warm process, `cold` starts an interpreter."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, *args: str, stdin: str = "", **environment: str) -> Ended:
        return self.forked(warm.exarq, *args, stdin=stdin, **environment)

    def forked(self, function: Callable[..., None], *args: str, stdin: str = "", **environment: str) -> Ended:
        """What a process says that was forked to run this function, and how it ends."""
        with tempfile.TemporaryDirectory() as streams:
            given, out, err = (Path(streams, name) for name in ("in", "out", "err"))
            given.write_text(stdin)
            process = Forked(Place(self.folder, self._environment(environment), given, out, err), function, *args)
            code = process.wait(_LIMIT)
            if code is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                raise AssertionError(f"{function.__name__} {args} still runs after {_LIMIT} s:\n{err.read_text()}")
            return Ended(code, out.read_text(), err.read_text())

    def cold(self, *args: str, stdin: str = "", **environment: str) -> Ended:
        """The command as a shell starts it."""
        done = subprocess.run(
            self._line(args),
            cwd=self.folder,
            env=self._environment(environment),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=_LIMIT,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def started(self, *args: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """The command while it runs; killed at the end of the block if it still does."""
        with subprocess.Popen(
            self._line(args),
            cwd=self.folder,
            env=self._environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def write(self, name: str, text: str) -> None:
        """Put the file there whole: who watches the folder sees one change."""
        draft = self.folder / f"{name}.new"
        draft.write_text(text)
        draft.replace(self.folder / name)

    def _line(self, args: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "worker", *args]

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("EXARQ_")}
        given = {**inherited, **self.environment, **more}
        return {name: value for name, value in given.items() if value}


@pytest.fixture
def bare(tmp_path: Path) -> Command:
    """The command in an empty folder without any setting."""
    return Command(tmp_path)


@pytest.fixture
def exarq(tmp_path: Path, database_url: str, redis_url: str) -> Command:
    """The command with the test's servers and two jobs: `shop.charge` and `shop.broken`."""
    command = Command(
        tmp_path,
        {"EXARQ_DATABASE_URL": database_url, "EXARQ_REDIS_URL": redis_url, "EXARQ_JOBS_MODULES": "shop"},
    )
    command.write("shop.py", JOBS)
    return command
