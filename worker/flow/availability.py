"""Whether Redis is there: while it is away, a probe asks it in the background, so that no claim waits for it."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Final

from arq.connections import ArqRedis

from worker.broker.connection import UNREACHABLE
from worker.observe.events import RedisAway, RedisBack, emit

_PROBE_EVERY: Final = timedelta(seconds=1)


class Availability:
    """Knows whether Redis answered last."""

    def __init__(self, redis: ArqRedis) -> None:
        self._redis = redis
        self._probe: asyncio.Task[None] | None = None

    @property
    def away(self) -> bool:
        """Whether Redis is away."""
        return self._probe is not None and not self._probe.done()

    def lost(self, error: BaseException) -> None:
        """Redis did not answer; from now on it is away until a probe says otherwise."""
        if not self.away:
            emit(RedisAway(error=f"{type(error).__name__}: {error}"))
            self._probe = asyncio.get_running_loop().create_task(self._until_back(), name="exarq probe")

    async def close(self) -> None:
        """End the probe."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])

    async def _until_back(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_EVERY.total_seconds())
            try:
                await self._redis.ping()
            except UNREACHABLE:
                continue
            emit(RedisBack())
            return
