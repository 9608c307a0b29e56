"""Worker processes of the demo's own: started, recognised in the database, stopped, and only these."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from worker.core.errors import ExarqError
from worker.embedded.servers import Servers

COMMAND: Final = [sys.executable, "-m", "worker", "run"]
STOP_LIMIT: Final = 30.0  # longer than a worker's grace


class DemoFailed(ExarqError):
    """Raised when the demo cannot be told to its end."""


class WorkerProcess:
    """One worker in a process of its own."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.killed = False
        self._log = folder / f"{name.replace(' ', '-')}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 — our own program, run by the interpreter that runs us
                COMMAND,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                process_group=0,  # Ctrl-C is the demo's to act on
                preexec_fn=_end_with_us(),
            )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def require_running(self) -> None:
        """Fail, with its last words, when it has ended without being killed."""
        if not self.killed and not self.running:
            lines = self._log.read_text(errors="replace").splitlines()[-20:]
            raise DemoFailed("\n  ".join([f"{self.name} ended with {self._process.returncode}:", *lines]))

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended: Popen knows, for nobody else reaps it."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash does, and return when it is gone."""
        self.killed = True
        self.send(signal.SIGKILL)
        self._process.wait()

    def wait(self) -> int:
        """Return its exit code once it has ended by itself; by force after a limit."""
        try:
            return self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.returncode


@contextlib.contextmanager
def killed_at_the_end(workers: list[WorkerProcess]) -> Iterator[None]:
    """Whatever of these still runs when the block ends is killed."""
    try:
        yield
    finally:
        for worker in workers:
            if worker.running:
                worker.kill()


def environment(servers: Servers, modules: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Nothing that is configured here reaches the workers: the demo's own addresses, defaults for everything else."""
    empty = folder / "settings.toml"
    empty.touch()
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("EXARQ_")} | {
        "EXARQ_SETTINGS": str(empty),
        "EXARQ_DATABASE_URL": servers.database_url,
        "EXARQ_REDIS_URL": servers.redis_url,
        "EXARQ_JOBS_MODULES": ",".join(modules),
        "EXARQ_LOG_LEVEL": "warning",
    }


def _end_with_us() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
