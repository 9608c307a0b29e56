"""The parent of the servers, a program of its own: it ends them when the program that started it has ended.

Started as `python -I -S guard.py <temporary folder> <uid:gid or "">`. It answers with JSON lines: first the folder it
made, then, once a plan came by stdin, the servers' process ids or an error. Then it waits for the end of stdin, which
comes however its starter ends. It imports the standard library only, for it cannot import Exarq.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTER = os.getppid()
START_LIMIT = 120.0
STOP_LIMIT = 10.0


class Failed(Exception):
    """Raised when a server did not start; says what its log says."""


class Abandoned(Exception):
    """Raised when the program that started us has ended while we were starting."""


class Child:
    """A program below the guard, in a process group of its own, that cannot outlive the guard."""

    def __init__(self, name: str, command: list[str], folder: Path, ids: list[int], ending: signal.Signals) -> None:
        self.name = name
        self._ending = ending
        self._log = folder / f"{name}.log"
        drop: dict[str, Any] = {"user": ids[0], "group": ids[1], "extra_groups": []} if ids else {}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the plan comes from the program that started us
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_environment(folder),
                process_group=0,
                preexec_fn=_end_with_guard(ending),
                **drop,
            )
        self.pid = self._process.pid

    def ended(self) -> bool:
        """Whether it ended well; fails when it ended otherwise."""
        code = self._process.poll()
        if code:
            raise self._failed(f"ended with {code}")
        return code is not None

    def wait_until(self, ready: Callable[[], bool], deadline: float) -> None:
        """Return as soon as it is ready; fails when it ended before that or the deadline passed."""
        while not ready():
            if self._process.poll() is not None and not ready():
                raise self._failed(f"ended with {self._process.returncode}")
            if time.monotonic() > deadline:
                raise self._failed(f"was not ready within {START_LIMIT:.0f} s")
            if abandoned(within=0.005):
                raise Abandoned

    def reap(self) -> None:
        """Leave no zombie of a server that ended by itself."""
        self._process.poll()

    def end(self) -> None:
        """Ask it to end at once."""
        if self._process.poll() is None:
            self._process.send_signal(self._ending)

    def wait(self) -> None:
        """Wait until it has ended, by force in the end."""
        try:
            self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def _failed(self, what: str) -> Failed:
        lines = self._log.read_text(errors="replace").splitlines()[-20:]
        return Failed("\n  ".join([f"{self.name} {what}; its last lines:", *lines]))


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    # initdb would search the machine's time zone; every Exarq time is UTC anyway.
    return kept | {"LC_ALL": "C", "TZ": "UTC", "TMPDIR": str(folder)}


def _end_with_guard(ending: signal.Signals) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    import ctypes

    prctl, guard = ctypes.CDLL(None).prctl, os.getpid()

    # Runs after the change of user, which would clear it. The kernel sends the signal when the *thread* that forked
    # ends, so every child is started by the guard's only thread.
    def ask_kernel() -> None:
        prctl(1, int(ending), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != guard:
            os._exit(1)

    return ask_kernel


def abandoned(within: float) -> bool:
    """Wait this long for the end of the program that started us; True when it has ended."""
    # A process forked from our starter may keep the pipe open, so its end alone would not do.
    return bool(select.select([0], [], [], within)[0]) or os.getppid() != STARTER


def start(plan: dict[str, Any], folder: Path, ids: list[int], children: list[Child]) -> dict[str, int | None]:
    """Start what the plan names, side by side, and return the process ids when all of it answers."""
    deadline = time.monotonic() + START_LIMIT
    postgres, redis = plan["postgres"], plan["redis"]
    pids: dict[str, int | None] = {"postgres": None, "redis": None}

    def child(name: str, command: list[str], ending: signal.Signals) -> Child:
        children.append(Child(name, command, folder, ids, ending))
        return children[-1]

    initdb = child("initdb", postgres["initdb"], signal.SIGKILL) if postgres and postgres["initdb"] else None
    if redis:
        server = child("redis", redis["server"], signal.Signals(redis["ending"]))
        server.wait_until(lambda: redis_answers(redis["socket"]), deadline)
        pids["redis"] = server.pid
    if postgres:
        if initdb:
            initdb.wait_until(initdb.ended, deadline)
            Path(postgres["made"]).rename(postgres["data"])
        server = child("postgres", postgres["server"], signal.Signals(postgres["ending"]))
        server.wait_until(lambda: postgres_answers(postgres["pidfile"], server.pid), deadline)
        pids["postgres"] = server.pid
    return pids


def redis_answers(path: str) -> bool:
    """Whether Redis says PONG."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(1)
        try:
            line.connect(path)
            line.sendall(b"PING\r\n")
            return line.recv(7) == b"+PONG\r\n"
        except OSError:
            return False


def postgres_answers(pidfile: str, pid: int) -> bool:
    """Whether the PostgreSQL of this pid takes sessions: its socket is there before that, so ask as pg_ctl does."""
    try:
        lines = Path(pidfile).read_text().splitlines()
    except OSError:
        return False
    # A file that an earlier server left, which was killed, says "ready" too.
    return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"


def remove(folder: Path) -> None:
    """Remove the folder, also while a process that is just ending still writes there."""
    deadline = time.monotonic() + STOP_LIMIT
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(0.01)


def say(**words: Any) -> None:
    """Write one line of JSON to the program that started us."""
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def guard(base: Path, ids: list[int]) -> None:
    """Make the folder, start the servers, hold them until abandoned, and leave nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="exarq-", dir=base))
    children: list[Child] = []
    try:
        if ids:
            os.chown(folder, *ids)
        say(folder=str(folder))
        if line := sys.stdin.readline():
            say(ready=start(json.loads(line), folder, ids, children))
            while not abandoned(within=1):
                for child in children:
                    child.reap()
    except (Failed, OSError) as error:
        say(error=str(error))
    except Abandoned:
        pass
    finally:
        for child in children:
            child.end()
        for child in children:
            child.wait()
        remove(folder)


def main() -> None:
    """Run until abandoned; a signal from the terminal is for the program that started us to act on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the servers would inherit
    os.umask(0o077)
    guard(Path(sys.argv[1]), [int(number) for number in sys.argv[2].split(":") if number])


if __name__ == "__main__":
    main()
