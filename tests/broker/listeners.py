"""Who listens for cancel requests, and what is heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from uuid import UUID

from arq.connections import ArqRedis

from tests.support import until
from worker.broker import cancels
from worker.broker.cancels import CancelAsked
from worker.broker.keys import cancel_channel

SECOND = timedelta(seconds=1)


@asynccontextmanager
async def listening(redis: ArqRedis, installation: UUID) -> AsyncIterator[list[CancelAsked]]:
    """What is heard while the block lasts, from the first moment on."""
    told: list[CancelAsked] = []

    async def listen() -> None:
        async with aclosing(cancels.heard(redis, installation, timeout=SECOND)) as messages:
            async for message in messages:
                told.append(message)  # noqa: PERF401 — the test looks on meanwhile

    task = asyncio.create_task(listen())
    try:
        await until(lambda: listeners(redis, installation), "somebody listens")
        yield told
    finally:
        task.cancel()
        await asyncio.wait([task])


async def listeners(redis: ArqRedis, installation: UUID) -> int:
    ((_, count),) = await redis.pubsub_numsub(cancel_channel(installation))
    return int(count)
