"""Exarq as it is in this checkout, run by its own command with its defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sqlalchemy import insert, text

from tests.bench import business, exarq_jobs
from tests.bench.peer import REDIS_URL, About, System, serve
from worker import Client, enqueue_many
from worker.db import migrate
from worker.db.ids import uuid7
from worker.db.models import Job

_BY_HAND = insert(Job.__table__)  # type: ignore[arg-type]  # the table, as a good engineer would
_LEFT = text("SELECT count(*) FROM exarq.job WHERE state IN ('queued', 'running')")


class Exarq(System):
    """Exarq."""

    about = About(
        name="exarq",
        packages=("exarq", "sqlalchemy", "asyncpg"),
        setting="exarq run --concurrency 20, its default (500 for noop and wait); otherwise as installed",
        source="README.md, `exarq config`",
        published="none but this table",
        keeps="state and result",
        keeps_in="both",
        concurrency={"noop": 500},
        processes=2,
    )

    async def open(self) -> None:
        self._client = await Client().__aenter__()

    async def close(self) -> None:
        await self._client.__aexit__(None, None, None)

    async def install(self) -> None:
        await migrate.upgrade(self._client.engine)

    async def reset(self) -> None:
        async with self._client.engine.begin() as connection:
            await connection.execute(text("TRUNCATE exarq.job, exarq.attempt"))

    async def enqueue(self, workload: str, number: int) -> None:
        async with self._client.sessions.begin() as session:
            await exarq_jobs.JOBS[workload].enqueue(session, number)

    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        job = exarq_jobs.JOBS[workload]
        async with self._client.sessions.begin() as session:
            await enqueue_many(session, [job.call(number) for number in numbers])
        await self._client.publisher.flush()

    async def left(self) -> int:
        async with self._client.engine.connect() as connection:
            return int((await connection.execute(_LEFT)).scalar_one())

    def work(self, workload: str, concurrency: int) -> None:
        os.execv(sys.executable, [sys.executable, "-m", "worker", "run", "--concurrency", str(concurrency)])

    async def by_hand(self, number: int) -> None:
        async with self._client.sessions.begin() as session:
            row = {"id": uuid7(), "name": "exarq_jobs.noop", "queue": "default", "args": {"number": number}}
            await session.execute(_BY_HAND, row)


def _configure() -> None:
    """The settings of this process, and of the worker that it becomes."""
    if REDIS_URL in os.environ:
        os.environ["EXARQ_DATABASE_URL"] = business.sqlalchemy_url()
        os.environ["EXARQ_REDIS_URL"] = os.environ[REDIS_URL]
        os.environ["EXARQ_JOBS_MODULES"] = exarq_jobs.__name__


if __name__ == "__main__":
    _configure()
    serve(Exarq)
