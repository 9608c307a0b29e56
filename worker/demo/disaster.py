"""The two disasters: a worker that dies in the middle of its work, and a Redis that loses everything."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Final
from uuid import UUID

from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.broker.keys import queue_key
from worker.core.names import DEFAULT_QUEUE
from worker.demo.processes import DemoFailed, WorkerProcess
from worker.demo.proof import out_of_step

MUST_HOLD: Final = 10
_WARM: Final = 50
_LIMIT: Final = 300.0
_QUIET_LIMIT: Final = 2.0

_IDS = text("SELECT pid, id FROM exarq.worker WHERE pid = ANY(:pids)")
_RUNNING = text("SELECT count(*) FROM exarq.job WHERE state = 'running' AND worker_id = :worker")
_SUCCEEDED = text("SELECT count(*) FROM exarq.job WHERE state = 'succeeded' AND worker_id = :worker")
_IN_FLIGHT = text(
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE application_name = :name AND pid <> pg_backend_pid() AND state = 'active'"
)


async def ids_of(connection: AsyncConnection, workers: list[WorkerProcess]) -> dict[int, UUID]:
    """The id under which each of these processes works, by process id, for those that have started."""
    rows = await connection.execute(_IDS, {"pids": [worker.pid for worker in workers]})
    return {row.pid: row.id for row in rows}


async def kill_one(
    engine: AsyncEngine, workers: list[WorkerProcess], *, between_commits: bool
) -> tuple[WorkerProcess, int]:
    """Kill one of the workers while it runs at least ten jobs; returns it and how many they were.

    It is stopped first, so that the number is counted on a process that can do nothing more, not guessed.

    Args:
        engine: where to count.
        workers: those to choose from.
        between_commits: wait for a moment at which some job's writes are committed and its completion is not.

    """
    ends = time.monotonic() + _LIMIT
    async with engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
        while time.monotonic() < ends:
            ids = await ids_of(connection, workers)
            for worker in workers:
                worker.require_running()
                if worker.pid not in ids or not await _is_busy(connection, ids[worker.pid]):
                    continue
                worker.send(signal.SIGSTOP)
                try:
                    await _until_quiet(connection, worker.pid, ids[worker.pid])
                    held = await _running(connection, ids[worker.pid])
                    caught = not between_commits or await out_of_step(connection, ids[worker.pid])
                    if held >= MUST_HOLD and caught:
                        worker.kill()
                        return worker, held
                finally:
                    if worker.running:
                        worker.send(signal.SIGCONT)
            await asyncio.sleep(0.02)
    raise DemoFailed(f"in {_LIMIT:g} s no worker was seen with {MUST_HOLD} running jobs, so none was killed")


async def wipe(redis: ArqRedis) -> tuple[int, int]:
    """Flush Redis with everything in it while hints wait there; returns how often it took, and how many waited."""
    key, wipes = queue_key(DEFAULT_QUEUE), 0
    ends = time.monotonic() + _LIMIT
    while time.monotonic() < ends:
        # A claimed hint stays in the set with a score in the future: only those due by now wait for a worker.
        seconds, _ = await redis.time()
        if await redis.zcount(key, "-inf", seconds * 1000):
            async with redis.pipeline(transaction=True) as pipe:
                pipe.zcount(key, "-inf", seconds * 1000)
                pipe.flushall()
                waiting, _ = await pipe.execute()
            wipes += 1
            if waiting:
                return wipes, int(waiting)
        await asyncio.sleep(0.005)
    raise DemoFailed(f"in {_LIMIT:g} s no hint was seen waiting in Redis, so it was not wiped")


async def _is_busy(connection: AsyncConnection, worker_id: UUID) -> bool:
    """Whether it is in the middle of its work, not still at its first claim."""
    succeeded = int((await connection.execute(_SUCCEEDED, {"worker": worker_id})).scalar_one())
    return succeeded >= _WARM and await _running(connection, worker_id) >= MUST_HOLD


async def _running(connection: AsyncConnection, worker_id: UUID) -> int:
    return int((await connection.execute(_RUNNING, {"worker": worker_id})).scalar_one())


async def _until_quiet(connection: AsyncConnection, pid: int, worker_id: UUID) -> None:
    """Return when the process stands still and the server has done all that it had sent."""
    name, quiet, ends = {"name": f"exarq {worker_id}"}, 0, time.monotonic() + _QUIET_LIMIT
    while quiet < 3 and time.monotonic() < ends:  # a statement may lie in a socket, not yet seen as active
        await asyncio.sleep(0.01)
        busy = (await connection.execute(_IN_FLIGHT, name)).scalar_one()
        quiet = 0 if busy else quiet + 1
