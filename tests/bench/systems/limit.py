"""The limit: the job's own statements and the completing one in one transaction of an `AsyncSession`, and no queue."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import uuid4

from sqlalchemy import bindparam, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests.bench import business
from tests.bench.peer import About, System, serve
from tests.bench.tally import began
from worker.db import migrate
from worker.db.ids import uuid7
from worker.db.models import Job

_TOKEN = uuid4()
_ROWS: Any = Job.__table__

_SUCCEED = (
    update(_ROWS)
    .where(_ROWS.c.id == bindparam("job"), _ROWS.c.token == bindparam("mine"), _ROWS.c.state == "running")
    .values(state="succeeded", result=bindparam("returned"), finished_at=func.clock_timestamp())
    .returning(_ROWS.c.id)
)


async def _legacy(session: AsyncSession, number: int) -> int:
    return await session.run_sync(business.post, number)


_JOBS: dict[str, Callable[[AsyncSession, int], Awaitable[int]]] = {"orm": business.write, "legacy": _legacy}


class Limit(System):
    """What PostgreSQL and SQLAlchemy allow on this machine."""

    about = About(
        name="limit",
        packages=("sqlalchemy", "asyncpg"),
        setting="no queue: 20 tasks, each job's statements and the guarded UPDATE of its row in one transaction",
        source="tests/bench/systems/limit.py",
        published="none",
        keeps="state and result",
        keeps_in="postgresql",
        workloads=("orm", "legacy"),
    )

    async def open(self) -> None:
        self._engine = create_async_engine(business.sqlalchemy_url())

    async def close(self) -> None:
        await self._engine.dispose()

    async def install(self) -> None:
        await migrate.upgrade(self._engine)

    async def reset(self) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(text("TRUNCATE exarq.job, exarq.attempt"))

    async def enqueue(self, workload: str, number: int) -> None:
        await self.enqueue_many(workload, [number])

    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        held = {"name": workload, "queue": "default", "state": "running", "token": _TOKEN, "worker_id": _TOKEN}
        rows = [{**held, "id": uuid7(), "args": {"number": number}, "attempt": 1} for number in numbers]
        async with self._engine.begin() as connection:
            await connection.execute(insert(_ROWS), rows)

    async def left(self) -> int:
        async with self._engine.connect() as connection:
            count = select(func.count()).select_from(_ROWS).where(_ROWS.c.state == text("'running'"))
            return int((await connection.execute(count)).scalar_one())

    def work(self, workload: str, concurrency: int) -> None:
        asyncio.run(_work(_JOBS[workload], concurrency))


async def _work(job: Callable[[AsyncSession, int], Awaitable[int]], concurrency: int) -> None:
    sessions = business.sessions(concurrency)
    async with sessions() as session:
        rows = (await session.execute(select(_ROWS.c.id, _ROWS.c.token, _ROWS.c.args).order_by(_ROWS.c.id))).all()
    waiting = iter(rows)

    async def slot() -> None:
        for job_id, token, args in waiting:
            began()
            async with sessions.begin() as session:
                returned = await job(session, args["number"])
                done = await session.execute(_SUCCEED, {"job": job_id, "mine": token, "returned": returned})
                done.scalar_one()

    await asyncio.gather(*(slot() for _ in range(concurrency)))
    os.read(0, 1)  # until the harness ends this process


if __name__ == "__main__":
    serve(Limit)
