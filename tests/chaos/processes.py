"""The processes under test, workers and producers: started, killed, stopped, and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import UUID

from tests.chaos import producer, sync_producer, worker
from tests.chaos.evidence import whole_lines
from tests.warm import Forked, Place

_ROOT: Final = Path(__file__).parents[2]


class Handle(Protocol):
    """What a forked process and a started program have in common."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


class Process:
    """One process under test, its evidence and its output."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.evidence = folder / f"{name}.jsonl"
        self.output = folder / f"{name}.log"
        self.output.touch()
        self.wanted = True  # to be started again when it ends
        self._handle: Handle | None = None
        self._noted: list[dict[str, Any]] = []
        self._read = 0

    def start(self, main: Callable[[], None], environment: dict[str, str]) -> None:
        """Fork it from the interpreter that has imported everything already."""
        place = Place(_ROOT, environment, Path(os.devnull), self.output, self.output)
        self._handle = Forked(place, main)

    def start_program(self, environment: dict[str, str], module: str = "worker") -> None:
        """Start a module of ours, a worker's, as a program of its own."""
        with self.output.open("ab") as log:
            self._handle = subprocess.Popen(
                [sys.executable, "-m", f"tests.chaos.{module}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=_ROOT, env=environment,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._handle is not None
        return self._handle.pid

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._handle.poll() if self._handle is not None else None

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.code is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.runs:
            os.kill(self.pid, number)

    async def ended(self, limit: float) -> int | None:
        """Its exit code once it has ended; None if it still runs after `limit` seconds."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + limit
        while self.runs and loop.time() < ends:  # noqa: ASYNC110 — the end of a process sets no Event
            await asyncio.sleep(0.02)
        return self.code

    def noted(self, *kinds: str) -> list[dict[str, Any]]:
        """The lines of these kinds in its evidence; those that every job leaves are not kept."""
        if self.evidence.exists():
            with self.evidence.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            self._read += new.rfind(b"\n") + 1
            self._noted += [line for line in whole_lines(new) if line["what"] not in ("began", "effect")]
        return [line for line in self._noted if line["what"] in kinds]

    @property
    def worker_id(self) -> UUID | None:
        """The id under which it works now; None before it has one."""
        lines = self.noted("WorkerStarted", "WorkerRenewed")
        return UUID(lines[-1].get("new") or lines[-1]["worker"]) if lines else None


def environment(**ours: object) -> dict[str, str]:
    """The environment of a process under test: nothing that is configured for Exarq here reaches it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("EXARQ_", "CHAOS_"))}
    return inherited | {name.upper(): str(value) for name, value in ours.items()}


WORKER: Final = worker.main
PRODUCER: Final = producer.main
SYNC_PRODUCER: Final = sync_producer.main
