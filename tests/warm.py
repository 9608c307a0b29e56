"""Processes forked from an interpreter that has imported Exarq already, so that a test does not pay for it again."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "alembic.command",
        "worker.cli.config",
        "worker.cli.db",
        "worker.cli.enqueue",
        "worker.cli.jobs.listing",
        "worker.cli.jobs.moving",
        "worker.cli.jobs.showing",
        "worker.cli.run",
        "worker.cli.schedules.changing",
        "worker.cli.schedules.listing",
        "worker.client",
    ]
)


@dataclass(frozen=True)
class Place:
    """Where a process runs: its folder, its whole environment, and the files that are its standard streams."""

    folder: Path
    environment: dict[str, str]
    stdin: Path
    stdout: Path
    stderr: Path


class Forked:
    """A process of its own that runs one function; its end, its exit code and its signals are real."""

    def __init__(self, place: Place, function: Callable[..., None], *args: Any) -> None:
        self._process = _context.Process(target=_run, args=(place, function, *args))
        self._process.start()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to a process that still runs."""
        os.kill(self.pid, number)

    def wait(self, limit: float | None = None) -> int | None:
        """Wait for its end; None if it still runs after `limit` seconds."""
        self._process.join(limit)
        return self._process.exitcode


def exarq(*args: str) -> None:
    """What `python -m worker` does with these arguments."""
    from worker.cli import main

    sys.argv = ["exarq", *args]
    main()


def script(path: str, *args: str) -> None:
    """What `python` does with the name of a script."""
    sys.argv = [path, *args]
    runpy.run_path(path, run_name="__main__")


def module(name: str, *args: str) -> None:
    """What `python -m` does with the name of a module."""
    sys.argv = [name, *args]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run(place: Place, function: Callable[..., None], *args: Any) -> None:
    os.chdir(place.folder)
    os.environ.clear()
    os.environ.update(place.environment)
    more = place.environment.get("PYTHONPATH")  # which an interpreter reads at its start only
    sys.path[:0] = [str(place.folder), *(more.split(os.pathsep) if more else [])]
    for number, path, how in (
        (0, place.stdin, os.O_RDONLY),
        (1, place.stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, place.stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, how, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 — lives as long as the process
    function(*args)
