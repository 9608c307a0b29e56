"""Redis that is wiped, away, silent, replaced, or forgets."""

from __future__ import annotations

import asyncio
import signal
from typing import Final

from tests.chaos import jobs, looks
from tests.chaos.faults import fault
from tests.chaos.stage import Stage

OLD_HINTS: Final = 1_000


@fault("redis")
async def flushall(stage: Stage) -> None:
    """Redis loses everything."""
    for _ in range(3):
        await stage.redis.flushall()
        stage.wiped()
        await asyncio.sleep(stage.pace.lease / 4)


@fault("redis")
async def redis_refused(stage: Stage) -> None:
    """Redis is stopped for three leases, with all it held."""
    stage.to_redis.refuse()
    await stage.redis_server.stop()
    await asyncio.sleep(3 * stage.pace.lease)
    stage.wiped()
    await stage.redis_server.start()
    stage.to_redis.restore()
    await asyncio.sleep(stage.pace.lease / 2)


@fault("redis")
async def redis_silent(stage: Stage) -> None:
    """Redis accepts connections and says nothing for three leases."""
    stage.to_redis.silence()
    await asyncio.sleep(3 * stage.pace.lease)
    stage.to_redis.restore()
    await asyncio.sleep(stage.pace.lease / 2)


@fault("redis")
async def redis_half_open(stage: Stage) -> None:
    """Every connection to Redis falls silent, and only a lease later do the kernels notice; new ones work."""
    stage.to_redis.half_open()
    await asyncio.sleep(stage.pace.lease)
    stage.to_redis.end_half_open()


@fault()
async def old_snapshot(stage: Stage) -> None:
    """Redis is replaced by a snapshot with 1,000 hints of jobs that have finished since."""
    for process in stage.workers:  # so that the hints wait at one moment
        process.send(signal.SIGSTOP)
    try:
        ids = await stage.place(*[jobs.noop.call()] * OLD_HINTS)
        await stage.until(lambda: looks.knows_hints(stage.redis, OLD_HINTS), "their hints are in Redis", 20)
        snapshot = await stage.redis_server.snapshot()
    finally:
        for process in stage.workers:
            process.send(signal.SIGCONT)
    await stage.until(lambda: looks.have_ended(stage.engine, ids), "their jobs have finished", 120)
    await stage.redis_server.stop()
    stage.wiped()
    await stage.redis_server.start(snapshot)
    await asyncio.sleep(stage.pace.lease / 2)


@fault("redis")
async def evictions(stage: Stage) -> None:
    """One key in a hundred and one hint in a hundred vanish from Redis, again and again for a lease."""
    for _ in range(10):
        stage.evicted |= set((await stage.redis_server.evict(0.01, stage.rng)).hints)
        stage.wiped()
        await asyncio.sleep(stage.pace.lease / 10)
