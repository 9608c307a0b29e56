"""A pgbouncer of this test process's own: in transaction mode, and with another backend for every transaction."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.engine import URL

VARIABLE = "EXARQ_TEST_POOLER"

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
server_lifetime = 0
max_client_conn = 500
default_pool_size = 50
"""


@contextmanager
def a_pooler(postgres: URL) -> Iterator[URL]:
    """The address of PostgreSQL through a pgbouncer that runs while the block lasts."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program is not None, f"{VARIABLE} needs Debian's package pgbouncer"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # it runs as nobody where we are root
        listen = _free_port()
        users, settings = folder / "users.txt", folder / "pgbouncer.ini"
        users.write_text(f'"{postgres.username}" "{postgres.password or ""}"\n')
        host, port = postgres.query.get("host", postgres.host), postgres.query.get("port", postgres.port) or 5432
        settings.write_text(_SETTINGS.format(host=host, port=port, listen=listen, users=users))
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [program, str(settings)],
                stdout=log,
                stderr=log,
                user="nobody" if os.geteuid() == 0 else None,
                preexec_fn=_die_with_parent,
            )
        try:
            _answers(process, listen, folder / "log")
            yield postgres.set(host="127.0.0.1", port=listen, query={})
        finally:
            process.terminate()
            process.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(500):
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(log.read_text())
