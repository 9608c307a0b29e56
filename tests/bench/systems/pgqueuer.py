# /// script
# requires-python = ">=3.11"
# dependencies = ["pgqueuer[asyncpg]==1.6.0", "sqlalchemy[asyncio]==2.1.9", "asyncpg==0.32.0"]
# ///
"""PgQueuer, with a hand-written session per job."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg
import uvloop
from pgqueuer import PgQueuer, run
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from tests.bench import business
from tests.bench.peer import DATABASE_URL, WAITING, About, System, serve
from tests.bench.tally import arrived, began

_BATCH = 10_000  # of one INSERT


@asynccontextmanager
async def _queue(concurrency: int) -> AsyncIterator[PgQueuer]:
    """A connection of its own for the queue, as the tuning guide advises, and the jobs' engine."""
    connection = await asyncpg.connect(os.environ[DATABASE_URL])
    queue = PgQueuer(AsyncpgDriver(connection))
    sessions = business.sessions(concurrency)

    @queue.entrypoint("noop")
    async def noop(_job: Job) -> None:
        began()

    @queue.entrypoint("wait")
    async def wait(_job: Job) -> None:
        began()
        await asyncio.sleep(WAITING)

    @queue.entrypoint("latency")
    async def latency(job: Job) -> None:
        arrived(_number(job))

    @queue.entrypoint("orm")
    async def orm(job: Job) -> None:
        began()
        async with sessions.begin() as session:
            await business.write(session, _number(job))

    @queue.entrypoint("legacy")
    async def legacy(job: Job) -> None:
        began()
        async with sessions.begin() as session:
            await session.run_sync(business.post, _number(job))

    yield queue


def _number(job: Any) -> int:
    assert job.payload is not None
    return int(job.payload)


class PgQueuerSystem(System):
    """PgQueuer."""

    about = About(
        name="pgqueuer",
        packages=("pgqueuer", "uvloop", "sqlalchemy", "asyncpg"),
        setting="pgqueuer.run on uvloop, as its command does, with a connection of its own for the queue, `pgq autovac`, durable tables, batch_size"
        " half of max_concurrent_tasks, which is 1,000 for noop, 40 with a session, 500 for wait",
        source="docs/guides/performance-tuning.md of github.com/janbjorge/pgqueuer",
        published="6,400 to 18,000 jobs/s: docs/comparisons/benchmarks.md there",
        keeps="a line per job in its log table, no result; the job's own transaction is another one",
        keeps_in="postgresql",
        concurrency={"noop": 1_000, "latency": 100, "orm": 40, "legacy": 40},
    )

    _connection: asyncpg.Connection[Any]
    _queries: Any

    async def open(self) -> None:
        self._connection = await asyncpg.connect(os.environ[DATABASE_URL])
        self._queries = Queries(AsyncpgDriver(self._connection))

    async def close(self) -> None:
        await self._connection.close()

    async def install(self) -> None:
        await self._queries.install()
        await self._queries.optimize_autovacuum()

    async def reset(self) -> None:
        await self._connection.execute("TRUNCATE pgqueuer, pgqueuer_log, pgqueuer_statistics")

    async def enqueue(self, workload: str, number: int) -> None:
        await self._queries.enqueue(workload, str(number).encode())

    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        for first in range(0, len(numbers), _BATCH):
            some = numbers[first : first + _BATCH]
            payloads = [str(number).encode() for number in some]
            await self._queries.enqueue([workload] * len(some), payloads, [0] * len(some))

    async def left(self) -> int:
        # One statement takes finished jobs out of this table and writes them into its log.
        return int(await self._connection.fetchval("SELECT count(*) FROM pgqueuer"))

    def work(self, workload: str, concurrency: int) -> None:
        # What `pgq run` does, on its event loop; the command itself fails with the typer that it is installed with.
        batch = concurrency // 2
        uvloop.run(run(partial(_queue, concurrency), batch_size=batch, max_concurrent_tasks=concurrency))


if __name__ == "__main__":
    serve(PgQueuerSystem)
