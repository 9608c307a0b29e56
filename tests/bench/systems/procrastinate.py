# /// script
# requires-python = ">=3.11"
# dependencies = ["procrastinate==3.10.0", "psycopg[binary]==3.3.9", "sqlalchemy[asyncio]==2.1.9", "asyncpg==0.32.0"]
# ///
"""Procrastinate, with a hand-written session per job."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from procrastinate import App, PsycopgConnector

from tests.bench import business
from tests.bench.peer import DATABASE_URL, WAITING, About, System, serve
from tests.bench.tally import arrived, began

_BATCH = 1_000
_LEFT = "SELECT count(*) AS number FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
_EMPTY = "TRUNCATE procrastinate_jobs, procrastinate_events, procrastinate_periodic_defers, procrastinate_workers"


def _app(connections: int, concurrency: int = 1) -> App:
    app = App(connector=PsycopgConnector(conninfo=os.environ[DATABASE_URL], max_size=connections))
    sessions = business.sessions(concurrency)

    @app.task(name="noop")
    async def noop(number: int) -> int:
        began()
        return number

    @app.task(name="wait")
    async def wait(number: int) -> int:
        began()
        await asyncio.sleep(WAITING)
        return number

    @app.task(name="latency")
    async def latency(number: int) -> int:
        arrived(number)
        return number

    @app.task(name="orm")
    async def orm(number: int) -> int:
        began()
        async with sessions.begin() as session:
            return await business.write(session, number)

    @app.task(name="legacy")
    async def legacy(number: int) -> int:
        began()
        async with sessions.begin() as session:
            return int(await session.run_sync(business.post, number))

    return app


class Procrastinate(System):
    """Procrastinate."""

    about = About(
        name="procrastinate",
        packages=("procrastinate", "psycopg", "sqlalchemy", "asyncpg"),
        setting="run_worker_async(concurrency=20; 500 for wait) with LISTEN, as by default, PsycopgConnector with a pool of"
        " concurrency + 1, at most 50, and psycopg's C implementation",
        source="https://procrastinate.readthedocs.io/en/stable/discussions.html#mind-the-size-of-your-postgresql-pool",
        published="none",
        keeps="state and its events, no result; the job's own transaction is another one",
        keeps_in="postgresql",
    )

    async def open(self) -> None:
        self._app = _app(connections=10)
        await self._app.open_async()

    async def close(self) -> None:
        await self._app.close_async()

    async def install(self) -> None:
        await self._app.schema_manager.apply_schema_async()

    async def reset(self) -> None:
        await self._app.connector.execute_query_async(_EMPTY)

    async def enqueue(self, workload: str, number: int) -> None:
        await self._app.tasks[workload].defer_async(number=number)

    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        task: Any = self._app.tasks[workload]
        for first in range(0, len(numbers), _BATCH):
            await task.batch_defer_async(*({"number": number} for number in numbers[first : first + _BATCH]))

    async def left(self) -> int:
        row = await self._app.connector.execute_query_one_async(_LEFT)
        return int(row["number"])

    def work(self, workload: str, concurrency: int) -> None:
        asyncio.run(_work(concurrency))


async def _work(concurrency: int) -> None:
    # A server takes 100 connections by default, and the jobs have theirs.
    async with _app(min(concurrency + 1, 50), concurrency).open_async() as app:
        await app.run_worker_async(concurrency=concurrency)


if __name__ == "__main__":
    serve(Procrastinate)
