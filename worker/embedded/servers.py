"""Start and stop a private PostgreSQL and Redis."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from worker.core.errors import EmbeddedServerError
from worker.embedded import commands
from worker.embedded.account import server_account, temporary_base
from worker.embedded.binaries import find_postgres, find_redis
from worker.embedded.guard import remove
from worker.embedded.lifeline import Lifeline

if TYPE_CHECKING:
    from worker.embedded.kept import Kept  # not on Windows, where this module must still be importable


@dataclass(frozen=True)
class Server:
    """One running server."""

    url: str
    socket: Path
    pid: int

    def answers(self, timeout: float = 1.0) -> bool:
        """Whether its socket accepts a connection."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(timeout)
            try:
                line.connect(str(self.socket))
            except OSError:
                return False
            return True


@dataclass(frozen=True)
class Servers:
    """Where the servers are; asking for one that was not started is an error, never a None."""

    folder: Path
    postgres: Server | None
    redis: Server | None

    @property
    def database_url(self) -> str:
        """The address for SQLAlchemy."""
        return self._postgres.url

    @property
    def redis_url(self) -> str:
        """The address for redis-py and for ARQ."""
        return self._redis.url

    @property
    def postgres_pid(self) -> int:
        """The process id of the postmaster."""
        return self._postgres.pid

    @property
    def redis_pid(self) -> int:
        """The process id of Redis."""
        return self._redis.pid

    @property
    def all(self) -> list[Server]:
        """The servers that were started."""
        return [server for server in (self.postgres, self.redis) if server]

    @property
    def _postgres(self) -> Server:
        if self.postgres is None:
            raise EmbeddedServerError("no embedded PostgreSQL was started; start(postgres=True) starts one")
        return self.postgres

    @property
    def _redis(self) -> Server:
        if self.redis is None:
            raise EmbeddedServerError("no embedded Redis was started; start(redis=True) starts one")
        return self.redis


class RunningServers:
    """Servers that run until `stop()`, the end of the `with` block, or the end of this process in any way."""

    def __init__(self, urls: Servers, lifeline: Lifeline) -> None:
        self.urls = urls
        self._lifeline: Lifeline | None = lifeline
        self._before_stop: list[Callable[[], None]] = []
        self._stopping = threading.Lock()

    def before_stop(self, call: Callable[[], None]) -> None:
        """Have something called once, right before the servers are stopped."""
        self._before_stop.append(call)

    def stop(self) -> None:
        """Stop the servers and return when they and their folder are gone; again is harmless."""
        with self._stopping:
            while self._before_stop:
                self._before_stop.pop()()
            if self._lifeline is not None and not self._lifeline.cut():
                _sweep(self.urls)
            self._lifeline = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(*, fsync: bool = True, postgres: bool = True, redis: bool = True, kept: Kept | None = None) -> RunningServers:
    """Start the servers and return when they answer; nothing of them outlives this process but data that are kept."""
    if os.name != "posix":
        raise EmbeddedServerError("embedded servers need Linux or macOS; set EXARQ_DATABASE_URL and EXARQ_REDIS_URL")
    account = server_account()
    data = kept.prepare(account) if kept else None
    lifeline = Lifeline(temporary_base(account), account, kept.lock if kept else None)
    try:
        folder = lifeline.folder()
        plan = commands.Plan(
            postgres=commands.postgres_plan(folder, find_postgres(folder, account), fsync=fsync, kept=data)
            if postgres
            else None,
            redis=commands.redis_plan(folder, find_redis(folder, account), kept=data) if redis else None,
        )
        return RunningServers(_servers(folder, plan, lifeline.start(plan)), lifeline)
    except BaseException:
        lifeline.cut()
        raise


@contextlib.contextmanager
def running(*, fsync: bool = True, postgres: bool = True, redis: bool = True) -> Iterator[Servers]:
    """Servers for the length of a `with` block."""
    with start(fsync=fsync, postgres=postgres, redis=redis) as servers:
        yield servers.urls


def _servers(folder: Path, plan: commands.Plan, pids: dict[str, int | None]) -> Servers:
    postgres = redis = None
    if plan["postgres"] and (pid := pids["postgres"]):
        postgres = Server(commands.postgres_url(folder), Path(plan["postgres"]["socket"]), pid)
    if plan["redis"] and (pid := pids["redis"]):
        redis = Server(commands.redis_url(folder), Path(plan["redis"]["socket"]), pid)
    return Servers(folder, postgres, redis)


def _sweep(servers: Servers) -> None:
    """Do what a guard that was killed could not: end what still answers, remove the folder."""
    for server in servers.all:
        if server.answers():  # our private socket answers, so the process id is still that server's
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGQUIT if server is servers.postgres else signal.SIGKILL)
    remove(servers.folder)
