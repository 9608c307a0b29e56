# /// script
# requires-python = ">=3.11"
# dependencies = ["saq[redis,hiredis]==0.26.4", "redis==7.4.1", "hiredis==3.5.0", "sqlalchemy[asyncio]==2.1.9", "asyncpg==0.32.0"]
# ///
"""SAQ on Redis, with a hand-written session per job."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from saq import Worker
from saq.queue.redis import RedisQueue

from tests.bench import business
from tests.bench.peer import REDIS_URL, WAITING, About, System, serve
from tests.bench.tally import arrived, began

_AT_ONCE = 100  # SAQ has no call that enqueues many; its own benchmark gathers


async def noop(_ctx: dict[str, Any], *, number: int) -> int:
    began()
    return number


async def wait(_ctx: dict[str, Any], *, number: int) -> int:
    began()
    await asyncio.sleep(WAITING)
    return number


async def latency(_ctx: dict[str, Any], *, number: int) -> int:
    arrived(number)
    return number


async def orm(ctx: dict[str, Any], *, number: int) -> int:
    began()
    async with ctx["sessions"].begin() as session:
        return await business.write(session, number)


async def legacy(ctx: dict[str, Any], *, number: int) -> int:
    began()
    async with ctx["sessions"].begin() as session:
        return int(await session.run_sync(business.post, number))


class Saq(System):
    """SAQ."""

    about = About(
        name="saq",
        packages=("saq", "redis", "hiredis", "sqlalchemy", "asyncpg"),
        setting="RedisQueue with hiredis, concurrency=20 (500 for wait), results kept for ten minutes, which is its default",
        source="README.md and docs/ of github.com/tobymao/saq",
        published="1,000 jobs in 0.92 s (1,087 jobs/s), enqueued in 0.18 s: benchmarks/README.md there",
        keeps="state and result for ten minutes, in memory; the job's own transaction is another one",
        keeps_in="redis",
        workloads=("noop", "orm", "legacy", "wait", "latency", "enqueue"),
    )

    _queue: RedisQueue

    async def open(self) -> None:
        self._queue = _queue()
        await self._queue.connect()

    async def close(self) -> None:
        await self._queue.disconnect()

    async def install(self) -> None:
        pass

    async def reset(self) -> None:
        pass

    async def enqueue(self, workload: str, number: int) -> None:
        await self._queue.enqueue(workload, number=number)

    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        for first in range(0, len(numbers), _AT_ONCE):
            await asyncio.gather(*(self.enqueue(workload, number) for number in numbers[first : first + _AT_ONCE]))

    async def left(self) -> int:
        # One MULTI stores the result and takes the id out of this set.
        return int(await self._queue.count("incomplete"))

    def work(self, workload: str, concurrency: int) -> None:
        asyncio.run(_work(concurrency))


async def _work(concurrency: int) -> None:
    queue = _queue()
    functions: Any = [noop, wait, latency, orm, legacy]

    async def startup(ctx: Any) -> None:
        ctx["sessions"] = business.sessions(concurrency)

    await queue.connect()
    await Worker(queue, functions, concurrency=concurrency, startup=startup).start()


def _queue() -> RedisQueue:
    return RedisQueue(Redis.from_url(os.environ[REDIS_URL]))  # Queue.from_url takes no unix:// address


if __name__ == "__main__":
    serve(Saq)
