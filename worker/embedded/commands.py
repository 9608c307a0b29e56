"""The command lines and addresses of the servers: everything inside one folder, nothing on the network."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

PORT = 5432  # names the socket's file only; in the address it keeps a PGPORT in the environment from being used


class PostgresPlan(TypedDict):
    """How the guard makes and runs PostgreSQL."""

    initdb: list[str]  # empty where the data are there
    made: str
    data: str
    server: list[str]
    socket: str
    pidfile: str
    ending: int


class RedisPlan(TypedDict):
    """How the guard runs Redis."""

    server: list[str]
    socket: str
    ending: int


class Plan(TypedDict):
    """What the guard is told to start; None for what was not asked for."""

    postgres: PostgresPlan | None
    redis: RedisPlan | None


def postgres_plan(folder: Path, programs: Path, *, fsync: bool, kept: Path | None = None) -> PostgresPlan:
    """A cluster made in this folder, as durable as a real one unless `fsync` is off; with its data kept, if so."""
    data = kept / "postgres" if kept else folder / "data"
    made = data.with_name("postgres.new") if kept else data  # one that is half made must not be taken for a whole
    options = {
        "listen_addresses": "",
        "port": str(PORT),
        "unix_socket_directories": str(folder),
        "unix_socket_permissions": "0700",
        "dynamic_shared_memory_type": "mmap",  # files inside the folder, nothing in /dev/shm
        "max_connections": "300",
    }
    if not fsync:
        options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    initdb = [str(programs / "initdb"), *([] if kept else ["--no-sync"]), "-U", "postgres", "-A", "trust"]
    server = [str(programs / "postgres"), "-D", str(data)]
    for name, value in options.items():
        server += ["-c", f"{name}={value}"]
    return {
        "initdb": [] if data.exists() else [*initdb, "--encoding", "UTF8", "--locale", "C", "-D", str(made)],
        "made": str(made),
        "data": str(data),
        "server": server,
        "socket": str(folder / f".s.PGSQL.{PORT}"),
        "pidfile": str(data / "postmaster.pid"),
        # An immediate shutdown where the data are thrown away, a fast one where they are kept.
        "ending": signal.SIGINT if kept else signal.SIGQUIT,
    }


def postgres_url(folder: Path) -> str:
    """The address for SQLAlchemy."""
    return f"postgresql+asyncpg://postgres@/postgres?host={quote(str(folder))}&port={PORT}"


def redis_plan(folder: Path, program: Path, *, kept: Path | None = None) -> RedisPlan:
    """A Redis that keeps nothing on disk, unless it is told where."""
    socket = str(folder / "redis.sock")
    server = [str(program), "--port", "0", "--unixsocket", socket, "--unixsocketperm", "700"]
    data = str(kept / "redis" if kept else folder)
    server += ["--save", "", "--appendonly", "yes" if kept else "no", "--dir", data, "--daemonize", "no"]
    return {"server": server, "socket": socket, "ending": signal.SIGTERM if kept else signal.SIGKILL}


def redis_url(folder: Path) -> str:
    """The address for redis-py and for ARQ."""
    return f"unix://{folder / 'redis.sock'}?db=0"
