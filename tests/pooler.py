"""A pgbouncer of this test process's own, in transaction mode; as a rule each transaction has a new backend."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

VARIABLE = "EXARQ_TEST_POOLER"
PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")

needs_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer")

_SETTINGS = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = transaction
server_lifetime = {lifetime}
max_client_conn = 500
default_pool_size = {backends}
"""


_ENDS_ITSELF = "bad client state"
"""What Debian 12's version ends itself with when a cancel request's client leaves early (pgbouncer's issue 801)."""


@contextmanager
def a_pooler(postgres: URL, *, keeps_backends: bool = False, backends: int = 50) -> Iterator[URL]:
    """The address of PostgreSQL through a pgbouncer that runs while the block lasts, started again as systemd would.

    Args:
        postgres: the server itself.
        keeps_backends: whether a backend serves more than one transaction, and what one leaves on it meets the next.
        backends: how many it has for each database.

    """
    assert PROGRAM is not None, f"{VARIABLE} needs Debian's package pgbouncer"
    pool = {"lifetime": 3600 if keeps_backends else 0, "backends": backends}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # it runs as nobody where we are root
        pooler = _Pooler(PROGRAM, folder, postgres, pool)
        try:
            yield postgres.set(host="127.0.0.1", port=pooler.port, query={})
            assert pooler.fault is None, pooler.fault
        finally:
            pooler.close()


class _Pooler:
    def __init__(self, program: str, folder: Path, postgres: URL, pool: dict[str, int]) -> None:
        self.fault: str | None = None
        self._parts = program, folder, postgres, pool
        self._process, self.port = _start(*self._parts)
        self._closes = False
        self._thread = threading.Thread(target=self._keep_up, name="pooler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closes = True
        self._process.terminate()
        self._thread.join()

    def _keep_up(self) -> None:
        while True:
            code = self._process.wait()
            if self._closes:
                return
            said = (self._parts[1] / "log").read_text()[-4000:]
            if _ENDS_ITSELF not in said:
                self.fault = f"it has ended, {code}: {said}"
                return
            self._process, _ = _start(*self._parts, port=self.port)


def _start(
    program: str, folder: Path, postgres: URL, pool: dict[str, int], port: int | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """A pgbouncer that answers, and its port: another where somebody took ours before it did."""
    users, settings, log = folder / "users.txt", folder / "pgbouncer.ini", folder / "log"
    users.write_text(f'"{postgres.username}" "{postgres.password or ""}"\n')
    host, beyond = postgres.query.get("host", postgres.host), postgres.query.get("port", postgres.port) or 5432
    for _ in range(5):
        listen = port or free_port()
        settings.write_text(_SETTINGS.format(host=host, port=beyond, listen=listen, users=users, **pool))
        with log.open("w") as out:
            process = subprocess.Popen(
                [program, str(settings)],
                stdout=out,
                stderr=out,
                user="nobody" if os.geteuid() == 0 else None,
                preexec_fn=_die_with_parent,
            )
        if _answers(process, listen, log):
            return process, listen
    raise AssertionError(log.read_text())


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


def free_port() -> int:
    """A port of this machine that nobody has yet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    """Wait until it is up; False when it has ended because somebody has its port."""
    ends = time.monotonic() + 60
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            pass
        else:
            # Whoever has taken the port answers too.
            if "listening on 127.0.0.1" in log.read_text():
                return True
        if time.monotonic() > ends:
            process.kill()
            process.wait()
            raise AssertionError(log.read_text())
        time.sleep(0.02)
    return False
