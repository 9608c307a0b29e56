"""The processes of a system, and what they cost, seen from outside."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from tests.bench import peer, tally

_ROOT: Final = Path(__file__).parents[2]
_STOP_LIMIT: Final = 10.0


class BenchError(Exception):
    """Raised when a system or a server does not do what is asked of it; says what."""


class Script:
    """One system's script in its own environment.

    Args:
        path: the script.
        python: the interpreter of its environment.
        folder: where it runs; its logs are there, too.
        database_url: its database.
        redis_url: the Redis of all.

    """

    def __init__(self, path: Path, python: str, folder: Path, database_url: str, redis_url: str) -> None:
        self.folder = folder
        self.tally = folder / "tally"
        self._path, self._python = path, python
        self._addresses = {peer.DATABASE_URL: database_url, peer.REDIS_URL: redis_url, tally.FOLDER: str(self.tally)}
        self._control: asyncio.subprocess.Process | None = None

    def at(self, database_url: str) -> Script:
        """The same system, by another way to its database."""
        return Script(self._path, self._python, self.folder, database_url, self._addresses[peer.REDIS_URL])

    @asynccontextmanager
    async def controlled(self) -> AsyncIterator[None]:
        """Its controlling process, while the block lasts."""
        with self._log("control") as log:
            self._control = await asyncio.create_subprocess_exec(
                self._python, str(self._path), "control", env=environment(**self._addresses), cwd=self.folder,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip
            try:
                yield
            finally:
                assert self._control.stdin is not None
                self._control.stdin.close()
                try:
                    await asyncio.wait_for(self._control.wait(), _STOP_LIMIT)
                except TimeoutError:
                    self._control.kill()
                    await self._control.wait()
                self._control = None

    async def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """The controlling process' answer to one command.

        Raises: `BenchError` with what it raised.
        """
        control = self._control
        assert control is not None
        assert control.stdin is not None
        assert control.stdout is not None
        control.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
        line = await control.stdout.readline()
        if not line:
            raise BenchError(f"its controlling process ended during {do}: {self._last_words('control')}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{do}: {answer['error']}")
        return answer

    @asynccontextmanager
    async def workers(self, workload: str, concurrency: int, processes: int) -> AsyncIterator[Workers]:
        """So many worker processes, while the block lasts."""
        self.tally.mkdir(exist_ok=True)
        for path in self.tally.iterdir():
            path.unlink()
        with self._log("work") as log:
            started = [
                subprocess.Popen(  # noqa: ASYNC220 — asyncio's own would be waited for by a thread each
                    [self._python, str(self._path), "work", workload, str(concurrency)],
                    env=environment(**self._addresses), cwd=self.folder,
                    stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                )
                for _ in range(processes)
            ]  # fmt: skip
            try:
                yield Workers(started, self.tally, lambda: self._last_words("work"))
            finally:
                await _ended(started)

    def _log(self, name: str) -> IO[bytes]:
        return (self.folder / f"{name}.log").open("wb")

    def _last_words(self, name: str) -> str:
        lines = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "it said nothing"


class Workers:
    """Running worker processes."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], folder: Path, last_words: Any) -> None:
        self._processes = processes
        self._folder = folder
        self._last_words = last_words

    def begun(self) -> list[tally.Begun]:
        """What their jobs have noted so far.

        Raises: `BenchError` when a worker has ended.
        """
        for process in self._processes:
            if (code := process.poll()) is not None:
                raise BenchError(f"a worker ended with {code}: {self._last_words()}")
        return tally.read(self._folder)

    def latencies(self) -> list[float]:
        """The latencies their jobs have noted, ms."""
        return tally.read_latencies(self._folder)

    def cpu(self) -> dict[int, float]:
        """The CPU time that each process of their trees has used, user and system, seconds."""
        return {pid: found for pid in self._tree() if (found := cpu_of(pid)) is not None}

    @contextmanager
    def held(self) -> Iterator[None]:
        """They stand still while the block lasts, and go on together; for less than a lease."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def memory_mb(self) -> float | None:
        """The highest resident memory of their trees so far, MB; None where the system does not tell."""
        found = [peak for pid in self._tree() if (peak := peak_memory_of(pid)) is not None]
        return sum(found) if found else None

    def _tree(self) -> list[int]:
        found, queue = [], [process.pid for process in self._processes]
        while queue:
            found.append(pid := queue.pop())
            queue += children_of(pid)
        return found


def cpu_of(pid: int) -> float | None:
    """The CPU time of a process, all of its threads, seconds; None when it is gone or nobody tells."""
    if sys.platform != "linux":
        return None
    try:
        return (
            time.clock_gettime_ns(~pid << 3 | 2) / 1e9
        )  # the kernel's clock of another process, as clock_getcpuclockid
    except OSError:
        return None


def cpu_of_all(pid: int) -> float | None:
    """The CPU time of a process and of those it has started, also of those that have ended, seconds."""
    children = sum(cpu_of(child) or 0.0 for child in children_of(pid))
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return children + sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def peak_memory_of(pid: int) -> float | None:
    """VmHWM of a process, MB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)


def children_of(pid: int) -> list[int]:
    """The processes that this one has started."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def environment(**ours: str) -> dict[str, str]:
    """The environment of a script: nothing that is configured for Exarq here reaches it, our modules do."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("EXARQ_", "BENCH_"))}
    # A script beside which there is `arq.py` must import the library of that name.
    return inherited | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(_ROOT)} | ours


async def _ended(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, _STOP_LIMIT)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it has started and left behind
        await asyncio.to_thread(process.wait)
        if process.stdin:
            process.stdin.close()
