"""Systems on the same servers whose tables and queues last from run to run: each has its own of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from tests.bench import business
from tests.bench.install import Installed, Missing, install
from tests.bench.measure import Bench, Run
from tests.bench.processes import BenchError, Script
from tests.bench.servers import Servers
from tests.bench.workloads import EXARQ, SYSTEMS, WORKLOADS, Workload
from tests.db.plans import Rows, fill

WORKLOAD: Final = {workload.key: workload for workload in WORKLOADS}
_CHUNK: Final = 100_000
_START_LIMIT: Final = 60.0

R = TypeVar("R", bound="Rig")


class Rig(Bench):
    """One system with a database and a Redis database of its own.

    Args:
        servers: those that all share.
        script: the system.
        system: who it is.
        database_url: its database.
        redis: a client of its Redis database.

    """

    def __init__(self, servers: Servers, script: Script, system: Installed, database_url: str, redis: Redis) -> None:
        super().__init__(servers, script, database_url)
        self.servers = servers
        self.url = database_url
        self.script = script
        self.redis = redis
        self._system = system

    async def prepare(self) -> None:
        """Forget what was before."""
        await self.redis.flushdb()
        await self.sql("TRUNCATE bench_entry")
        await self.script.ask("reset")

    async def left(self) -> int:
        """How many jobs have not ended, once all of the run's have begun; those that still wait are not counted."""
        if self._system.name != EXARQ:
            return await super().left()
        return int(await self.sql("SELECT count(*) FROM exarq.job WHERE state = 'running'"))

    async def started(self, processes: int) -> None:
        """Return once so many workers of Exarq beat.

        Raises: `BenchError` where they do not for a minute.
        """
        if self._system.name != EXARQ:
            return
        ends = time.monotonic() + _START_LIMIT
        while await self.sql("SELECT count(*) FROM exarq.worker WHERE beat > 0") < processes:
            if time.monotonic() > ends:
                raise BenchError(f"{processes} workers did not start within {_START_LIMIT:g} s")
            await asyncio.sleep(0.1)

    async def once(self, key: str, jobs: int) -> Run:
        """One run of a workload."""
        await self.prepare()
        return await self.again(key, jobs)

    async def again(self, key: str, jobs: int) -> Run:
        """One run more, with what is there."""
        workload = WORKLOAD[key]
        return await self.measure(workload, self.concurrency(workload), jobs)

    def concurrency(self, workload: Workload) -> int:
        """The system's own."""
        return self._system.about.concurrency.get(workload.name, workload.concurrency)

    async def sql(self, statement: str) -> Any:
        """The first value that a statement returns."""
        connection = await asyncpg.connect(self.url)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()


class Filled(Rig):
    """Exarq with rows that last from run to run."""

    async def prepare(self) -> None:
        """Forget nothing."""

    async def fill(self, rows: Rows, *, after: int = 0) -> None:
        """Put rows into the table, and have the server learn of them."""
        engine = create_async_engine(async_url(self.url))
        async with engine.begin() as connection:
            await fill(connection, rows, after=after)
        await engine.dispose()
        await self.sql("VACUUM (ANALYZE) exarq.job, exarq.attempt")


class Backlog(Filled):
    """Exarq with jobs that are all due: a run takes as many as it needs from the head of the queue."""

    async def pile_up(self, key: str, jobs: int) -> None:
        """So many jobs that wait, each with its hint."""
        for first in range(0, jobs, _CHUNK):
            await super().enqueue(WORKLOAD[key], min(_CHUNK, jobs - first))
        await self.sql("VACUUM (ANALYZE) exarq.job")

    async def enqueue(self, workload: Workload, jobs: int) -> None:
        """Nothing: they are there."""

    async def left(self) -> int:
        """None: the run ends when its last job has begun, for the worker goes on with the next."""
        return 0


class Stage:
    """Makes rigs on the same servers; opened by `on_stage`."""

    def __init__(self, servers: Servers, stack: AsyncExitStack, folder: Path) -> None:
        self.servers = servers
        self._stack = stack
        self._folder = folder
        self._systems: dict[str, Installed] = {}
        self._rigs = 0

    async def rig(self, name: str = EXARQ) -> Rig:
        """The system with new databases.

        Raises: `BenchError` where it cannot be had.
        """
        return await self.rig_of(Rig, name)

    async def rig_of(self, kind: type[R], name: str = EXARQ) -> R:
        """The system with new databases, as a rig of this kind.

        Raises: `BenchError` where it cannot be had.
        """
        system = await self._system(name)
        self._rigs += 1
        url = await self.servers.database(name)
        redis_url = with_number(self.servers.redis_url, self._rigs)
        engine = create_async_engine(async_url(url))
        await business.install(engine)
        await engine.dispose()
        folder = self._folder / str(self._rigs)
        folder.mkdir()
        script = Script(system.path, system.python, folder, url, redis_url)
        await self._stack.enter_async_context(script.controlled())
        await script.ask("install")
        redis = Redis.from_url(redis_url)
        self._stack.push_async_callback(_forget, redis)
        return kind(self.servers, script, system, url, redis)

    async def _system(self, name: str) -> Installed:
        if name not in self._systems:
            found = await install(name, SYSTEMS)
            if isinstance(found, Missing):
                raise BenchError(f"{name}: {found.why}")
            self._systems[name] = found
        return self._systems[name]


@asynccontextmanager
async def old_snapshot(url: str) -> AsyncIterator[None]:
    """A transaction that sees the database as it is now, while the block lasts: no dead row can be cleared away."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await connection.execute("SELECT count(*) FROM pg_class")
        yield
        await connection.execute("ROLLBACK")
    finally:
        await connection.close()


def async_url(url: str) -> str:
    """The address as SQLAlchemy takes it."""
    return url.replace("postgresql://", "postgresql+asyncpg://", 1)


def with_number(redis_url: str, number: int) -> str:
    """The same Redis, another of its databases."""
    parts = urlsplit(redis_url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}?{urlencode({**dict(parse_qsl(parts.query)), 'db': number})}"
    return urlunsplit(parts._replace(path=f"/{number}"))


async def _forget(redis: Redis) -> None:
    await asyncio.shield(redis.flushdb())
    await redis.aclose()
