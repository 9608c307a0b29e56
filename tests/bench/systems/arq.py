# /// script
# requires-python = ">=3.11"
# dependencies = ["arq==0.28.0", "sqlalchemy[asyncio]==2.1.9", "asyncpg==0.32.0"]
# ///
"""arq, with a hand-written session per job as a good engineer would have it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from arq import create_pool
from arq.connections import ArqRedis, RedisSettings
from arq.constants import default_queue_name
from arq.worker import run_worker

from tests.bench import business
from tests.bench.peer import REDIS_URL, WAITING, About, System, serve
from tests.bench.tally import arrived, began

_AT_ONCE = 100  # ARQ has no call that enqueues many


async def noop(_ctx: dict[str, Any], number: int) -> int:
    began()
    return number


async def wait(_ctx: dict[str, Any], number: int) -> int:
    began()
    await asyncio.sleep(WAITING)
    return number


async def latency(_ctx: dict[str, Any], number: int) -> int:
    arrived(number)
    return number


async def orm(ctx: dict[str, Any], number: int) -> int:
    began()
    async with ctx["sessions"].begin() as session:
        return await business.write(session, number)


async def legacy(ctx: dict[str, Any], number: int) -> int:
    began()
    async with ctx["sessions"].begin() as session:
        return int(await session.run_sync(business.post, number))


class WorkerSettings:
    """As ARQ's own documentation has it."""

    functions: ClassVar[Any] = [noop, wait, latency, orm, legacy]
    redis_settings: ClassVar[RedisSettings]
    max_jobs: ClassVar[int]

    @staticmethod
    async def on_startup(ctx: dict[str, Any]) -> None:
        """One factory for the process; its engine opens nothing before the first statement."""
        ctx["sessions"] = business.sessions(WorkerSettings.max_jobs)


class Arq(System):
    """ARQ."""

    about = About(
        name="arq",
        packages=("arq", "redis", "sqlalchemy", "asyncpg"),
        setting="max_jobs=20 (500 for noop and wait), poll_delay 0.5 s, results kept for an hour, without its two log lines per job",
        source="the parameters of Worker, https://arq-docs.helpmanual.io",
        published="“around 7x faster than rq for short jobs with no io”: https://arq-docs.helpmanual.io",
        keeps="result for an hour, in memory; the job's own transaction is another one",
        keeps_in="redis",
        concurrency={"noop": 500},
    )

    _redis: ArqRedis

    async def open(self) -> None:
        self._redis = await create_pool(_redis_settings())

    async def close(self) -> None:
        await self._redis.aclose()

    async def install(self) -> None:
        pass

    async def reset(self) -> None:
        pass

    async def enqueue(self, workload: str, number: int) -> None:
        await self._redis.enqueue_job(workload, number)

    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        for first in range(0, len(numbers), _AT_ONCE):
            await asyncio.gather(*(self.enqueue(workload, number) for number in numbers[first : first + _AT_ONCE]))

    async def left(self) -> int:
        # One MULTI stores the result and takes the id out of the queue.
        return int(await self._redis.zcard(default_queue_name))

    def work(self, workload: str, concurrency: int) -> None:
        WorkerSettings.redis_settings = _redis_settings()
        WorkerSettings.max_jobs = concurrency
        run_worker(WorkerSettings)  # type: ignore[arg-type]  # as ARQ's command does


def _redis_settings() -> RedisSettings:
    return RedisSettings.from_dsn(os.environ[REDIS_URL])


if __name__ == "__main__":
    serve(Arq)
