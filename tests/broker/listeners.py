"""Who listens as the workers do, and what is heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from uuid import UUID

from arq.connections import ArqRedis

from tests.support import until
from worker.broker import messages
from worker.broker.keys import workers_channel
from worker.broker.messages import ToWorkers

_TIMEOUT = timedelta(seconds=30)


@asynccontextmanager
async def listening(redis: ArqRedis, installation: UUID) -> AsyncIterator[list[ToWorkers]]:
    """What is heard while the block lasts, from the first moment on."""
    told: list[ToWorkers] = []

    async def listen() -> None:
        async with aclosing(messages.told_to_workers(redis, installation, timeout=_TIMEOUT)) as heard:
            async for message in heard:
                told.append(message)  # noqa: PERF401 — the test looks on meanwhile

    task = asyncio.create_task(listen())
    try:
        await until(lambda: listeners(redis, installation), "somebody listens")
        yield told
    finally:
        task.cancel()
        await asyncio.wait([task])


async def listeners(redis: ArqRedis, installation: UUID) -> int:
    ((_, count),) = await redis.pubsub_numsub(workers_channel(installation))
    return int(count)


async def end_subscriptions(redis: ArqRedis) -> None:
    """End the connections that listen in this database of Redis; in another, somebody else's tests go on."""
    number = str(redis.connection_pool.connection_kwargs.get("db", 0))
    for client in await redis.client_list(_type="pubsub"):
        if client["db"] == number:
            await redis.client_kill_filter(_id=client["id"])
