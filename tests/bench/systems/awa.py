# /// script
# requires-python = ">=3.11"
# dependencies = ["awa-pg==0.6.9", "sqlalchemy[asyncio]==2.1.9", "asyncpg==0.32.0"]
# ///
"""Awa, whose worker is written in Rust, with a hand-written session per job."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from awa import AsyncClient

from tests.bench import business
from tests.bench.peer import DATABASE_URL, WAITING, About, System, serve
from tests.bench.tally import arrived, began

_QUEUE = "default"
_CONNECTIONS = 24  # "at least num_queues * 4 + 20"
_LEFT = """
SELECT (SELECT count(*) FROM awa.ready_entries) + (SELECT count(*) FROM awa.deferred_jobs)
    - (SELECT coalesce(sum(completed_count), 0) FROM awa.receipt_completion_batches) - (SELECT count(*) FROM awa.done_entries)
"""


@dataclass
class Noop:
    number: int


@dataclass
class Wait:
    number: int


@dataclass
class Latency:
    number: int


@dataclass
class Orm:
    number: int


@dataclass
class Legacy:
    number: int


_ARGUMENTS = {"noop": Noop, "wait": Wait, "latency": Latency, "orm": Orm, "legacy": Legacy}


class Awa(System):
    """Awa."""

    about = About(
        name="awa",
        packages=("awa-pg", "sqlalchemy", "asyncpg"),
        setting="AsyncClient.start with one queue of 20 workers (500 for noop and wait), a pool of 24 connections, queue storage,"
        " enqueue_many_copy; otherwise as installed",
        source="README.md of awa-pg on PyPI, docs/benchmarking.md (Tuning guidelines) of github.com/hardbyte/awa",
        published="3,100 jobs/s by a Python worker, insert_many_copy 16,200 jobs/s (Apple M5): docs/benchmarking.md there",
        keeps="state until its ring of tables turns, no result; the job's own transaction is another one",
        keeps_in="postgresql",
        concurrency={"noop": 500},
    )

    _client: Any
    _connection: asyncpg.Connection[Any]

    async def open(self) -> None:
        self._client = _client()
        self._connection = await asyncpg.connect(os.environ[DATABASE_URL])

    async def close(self) -> None:
        await self._client.close()
        await self._connection.close()

    async def install(self) -> None:
        await self._client.migrate()
        await self._client.install_queue_storage()

    async def reset(self) -> None:
        await self._client.install_queue_storage(reset=True)

    async def enqueue(self, workload: str, number: int) -> None:
        await self._client.insert(_ARGUMENTS[workload](number), queue=_QUEUE)

    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        jobs = [_ARGUMENTS[workload](number) for number in numbers]
        await self._client.enqueue_many_copy(jobs, queue=_QUEUE)

    async def left(self) -> int:
        # A ready entry stays until its table is emptied, with those that say that its jobs have ended.
        return int(await self._connection.fetchval(_LEFT))

    def work(self, workload: str, concurrency: int) -> None:
        asyncio.run(_work(concurrency))


async def _work(concurrency: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    client = _client()
    _register(client, concurrency)
    await client.start([(_QUEUE, concurrency)])
    await stop.wait()
    await client.shutdown()
    await client.close()


def _register(client: Any, concurrency: int) -> None:
    sessions = business.sessions(concurrency)

    @client.task(Noop, queue=_QUEUE)
    async def noop(_job: Any) -> None:
        began()

    @client.task(Wait, queue=_QUEUE)
    async def wait(_job: Any) -> None:
        began()
        await asyncio.sleep(WAITING)

    @client.task(Latency, queue=_QUEUE)
    async def latency(job: Any) -> None:
        arrived(job.args.number)

    @client.task(Orm, queue=_QUEUE)
    async def orm(job: Any) -> None:
        began()
        async with sessions.begin() as session:
            await business.write(session, job.args.number)

    @client.task(Legacy, queue=_QUEUE)
    async def legacy(job: Any) -> None:
        began()
        async with sessions.begin() as session:
            await session.run_sync(business.post, job.args.number)


def _client() -> AsyncClient:
    """Its parser wants a host in the address, also where a socket's folder is named later on."""
    url = urlsplit(os.environ[DATABASE_URL])
    named = url if url.hostname else url._replace(netloc=f"{url.netloc}localhost")
    return AsyncClient(named.geturl(), max_connections=_CONNECTIONS)


if __name__ == "__main__":
    serve(Awa)
