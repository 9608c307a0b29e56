"""The servers that all systems share: durable, checked to be so, and counted from outside."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import uuid4

import asyncpg
import pytest
from redis.asyncio import Redis
from sqlalchemy import make_url

from tests.bench.processes import BenchError, cpu_of_all
from worker.core.errors import EmbeddedServerError
from worker.embedded import servers

DATABASE_VARIABLE: Final = "EXARQ_BENCH_DATABASE_URL"
REDIS_VARIABLE: Final = "EXARQ_BENCH_REDIS_URL"

_DURABLE: Final = ("fsync", "synchronous_commit", "full_page_writes")
_COMMITS: Final = 200  # how many are timed for the head line
_TMPFS: Final = {"tmpfs", "ramfs", "devtmpfs"}


class Counters(NamedTuple):
    """What the servers have done so far."""

    wal_bytes: int
    commits: int
    redis_commands: int

    def since(self, before: Counters) -> Counters:
        """What was done since then."""
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))


class Servers:
    """PostgreSQL, with a database for each system, and Redis.

    Args:
        database_url: of a database where others can be created.
        redis_url: of an empty database of Redis.
        private: whether this run started them.
        postgres_pid: of the server, where this run started it.

    """

    def __init__(self, database_url: str, redis_url: str, *, private: bool, postgres_pid: int | None = None) -> None:
        self._database_url = _plain(database_url)
        self.redis_url = redis_url
        self._private = private
        self._postgres_pid = postgres_pid
        self._databases: list[str] = []
        self._checkpoints = True
        self._redis_is_ours = False
        self.facts: dict[str, str] = {}
        self._admin: asyncpg.Connection[Any]
        self._redis = Redis.from_url(redis_url)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Servers]:
        """Checked, and without our databases once the block ends.

        Raises: `BenchError` where PostgreSQL may lose what it has committed, and where Redis holds something.
        """
        self._admin = await asyncpg.connect(self._database_url)
        try:
            self.facts = await self._checked()
            if await self._redis.dbsize():
                raise BenchError(f"the Redis database of {REDIS_VARIABLE} is not empty; name an empty one")
            self._redis_is_ours = True
            yield self
        finally:
            for name in self._databases:
                await self._admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            if self._redis_is_ours:
                await self._empty_redis()
            await self._redis.aclose()
            await self._admin.close()

    async def _checked(self) -> dict[str, str]:
        """What they are and what makes a commit durable."""
        shown = {name: str(await self._admin.fetchval(f"SHOW {name}")) for name in ("server_version", *_DURABLE)}
        if any(shown[name] != "on" for name in _DURABLE):
            raise BenchError(f"this PostgreSQL may lose what it committed, so nothing is measured on it: {shown}")
        said = await self._redis.info("server")
        name = str(said.get("server_name", "redis"))
        return {**shown, "redis": f"{name} {said.get(f'{name}_version', said['redis_version'])}"}

    async def commit_ms(self) -> float:
        """How long one commit takes that does nothing else, ms."""
        begun = time.monotonic()
        for _ in range(_COMMITS):
            await self._admin.execute("SELECT pg_logical_emit_message(true, 'exarq', 'bench')")
        return (time.monotonic() - begun) / _COMMITS * 1000

    async def database(self, name: str) -> str:
        """The address of a new database."""
        database = f"exarq_bench_{uuid4().hex[:8]}_{name}"
        self._databases.append(database)
        await self._admin.execute(f"CREATE DATABASE {database}")
        return make_url(self._database_url).set(database=database).render_as_string(hide_password=False)

    async def reset(self, url: str) -> None:
        """Begin a run with an empty Redis and an empty journal of the business."""
        await self._empty_redis()
        connection = await asyncpg.connect(url)
        try:
            await connection.execute("TRUNCATE bench_entry")
        finally:
            await connection.close()

    async def entries(self, url: str) -> int:
        """How many lines the journal of the business has."""
        connection = await asyncpg.connect(url)
        try:
            return int(await connection.fetchval("SELECT count(*) FROM bench_entry"))
        finally:
            await connection.close()

    async def _empty_redis(self) -> None:
        """Delete what systems have left in Redis: it was empty when we came."""
        if self._private:
            await self._redis.flushall()
            return
        keys = [key async for key in self._redis.scan_iter(count=1000)]
        for first in range(0, len(keys), 1000):
            await self._redis.unlink(*keys[first : first + 1000])

    async def checkpoint(self) -> None:
        """Begin each run right after a checkpoint, so that all pay alike for the first touch of a page."""
        if self._checkpoints:
            try:
                await self._admin.execute("CHECKPOINT")
            except asyncpg.InsufficientPrivilegeError:
                self._checkpoints = False

    def postgres_cpu(self) -> float | None:
        """The CPU time that PostgreSQL has used, seconds; None where it is another's."""
        return None if self._postgres_pid is None else cpu_of_all(self._postgres_pid)

    async def backends(self, url: str) -> int:
        """How many connections this database has."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"
        return int(await self._admin.fetchval(query, _name(url)))

    async def counters(self, url: str, *, backends: int) -> Counters:
        """The counters, once no more than so many connections are left: a backend reports its commits as it ends."""
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                while await self.backends(url) > backends:  # noqa: ASYNC110 — a server sets no Event
                    await asyncio.sleep(0.01)
        wal = await self._admin.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')")
        commits = await self._admin.fetchval("SELECT xact_commit FROM pg_stat_database WHERE datname = $1", _name(url))
        stats = await self._redis.info("stats")
        return Counters(int(wal), int(commits), int(stats["total_commands_processed"]))


@asynccontextmanager
async def measured_servers() -> AsyncIterator[Servers]:
    """Those that the environment names, and private ones for what it does not."""
    database_url, redis_url = os.environ.get(DATABASE_VARIABLE), os.environ.get(REDIS_VARIABLE)
    wanted = {"postgres": database_url is None, "redis": redis_url is None}
    running = await asyncio.to_thread(_start, **wanted) if any(wanted.values()) else None
    try:
        both = Servers(
            database_url or (running.urls.database_url if running else ""),
            redis_url or (running.urls.redis_url if running else ""),
            private=redis_url is None,
            postgres_pid=running.urls.postgres_pid if running and database_url is None else None,
        )
        async with both.opened():
            yield both
    finally:
        if running:
            await asyncio.to_thread(running.stop)


def _start(*, postgres: bool, redis: bool) -> servers.RunningServers:
    """The wheels' servers, so that versions are the same on every machine, and on a disk; else those on PATH."""
    with tempfile.TemporaryDirectory() as nothing, pytest.MonkeyPatch.context() as patch:
        if _kind_of(Path(tempfile.gettempdir())) in _TMPFS:
            patch.setattr(tempfile, "tempdir", "/var/tmp")
        try:
            patch.setenv("PATH", nothing)
            return servers.start(postgres=postgres, redis=redis)
        except EmbeddedServerError:
            patch.undo()
            return servers.start(postgres=postgres, redis=redis)


def _kind_of(folder: Path) -> str:
    """The kind of file system that holds this folder; empty where nobody says."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    holding = [(len(place), kind) for _, place, kind, *_ in mounts if folder.resolve().is_relative_to(place)]
    return max(holding)[1] if holding else ""


def _plain(url: str) -> str:
    """The address as asyncpg and libpq take it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _name(url: str) -> str:
    return make_url(url).database or ""
