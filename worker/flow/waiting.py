"""Wait for jobs to end: told by a worker in a moment, seen in the row every two seconds where nobody tells."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Final
from uuid import UUID, uuid4
from weakref import WeakKeyDictionary

from arq.connections import ArqRedis
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.broker.connection import UNREACHABLE
from worker.broker.messages import EndAwaited, told_to_waiter
from worker.db import ends, reads
from worker.db.ends import Stand
from worker.db.failures import is_transient, schema_needed
from worker.db.send import once

NET: Final = timedelta(seconds=2)
"""How often the rows are looked at that somebody waits for, whatever is told."""

_LOOK_LIMIT: Final = timedelta(seconds=5)
_SIGN_LIMIT: Final = timedelta(seconds=5)

Announce = Callable[[Iterable[EndAwaited]], Awaitable[None]]


async def look(engine: AsyncEngine, ids: Iterable[UUID]) -> dict[UUID, Stand]:
    """How these jobs stand, on a connection of its own; an id without a row is left out.

    Raises: `SchemaNotMigrated`, and what the engine raises within five seconds.
    """
    with schema_needed():
        async with asyncio.timeout(_LOOK_LIMIT.total_seconds()):
            return await once(engine, lambda connection: ends.stands(connection, list(ids)))


class Waiting:
    """All waits of one event loop: one subscription for all, and one look for all of a database.

    Args:
        redis: the client to listen with; without one, only the rows are looked at.
        announce: tells the workers who waits for what, and returns once they are told, or soon.

    """

    def __init__(self, redis: ArqRedis | None, announce: Announce) -> None:
        self._id = uuid4()
        self._redis = redis
        self._announce = announce
        self._watches: dict[Engine, _Watch] = {}
        self._installations: WeakKeyDictionary[Engine, UUID] = WeakKeyDictionary()
        self._listening: asyncio.Task[None] | None = None
        self._heard = False

    async def until_ended(self, engine: AsyncEngine, job_id: UUID) -> Stand:
        """Return when the job has ended, and how; a job without a row may still get one.

        Raises: `SchemaNotMigrated`, and what keeps PostgreSQL from answering for good.
        """
        watch = self._watches.get(engine.sync_engine)
        if watch is None:
            watch = self._watches[engine.sync_engine] = _Watch(self, engine)
        self.listen()
        ended: asyncio.Future[Stand] = asyncio.get_running_loop().create_future()
        watch.add(job_id, ended)
        try:
            return await ended
        finally:
            if watch.remove(job_id, ended) and self._watches.get(engine.sync_engine) is watch:
                del self._watches[engine.sync_engine]

    def listen(self) -> None:
        """See to it that the workers' messages are heard."""
        if self._redis is not None and (self._listening is None or self._listening.done()):
            self._listening = asyncio.create_task(self._listen(self._redis), name="exarq waiting")

    async def announce(self, engine: AsyncEngine, ids: Iterable[UUID]) -> None:
        """Tell the workers that somebody waits for these jobs, if their answer can be heard."""
        if not self._heard:
            return
        installation = self._installations.get(engine.sync_engine)
        if installation is None:
            with schema_needed():
                installation = await once(engine, reads.installation_id)
            self._installations[engine.sync_engine] = installation
        await self._announce([EndAwaited(job_id, self._id, installation) for job_id in ids])

    async def close(self) -> None:
        """End the listening and every wait."""
        tasks = [self._listening] if self._listening is not None else []
        closed = RuntimeError("the publisher was closed while somebody waited for a job; close it last")
        tasks += [watch.end(closed) for watch in self._watches.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _listen(self, redis: ArqRedis) -> None:
        """Have the jobs looked at that workers tell of, until Redis goes or nobody has waited for a while."""
        try:
            async with aclosing(told_to_waiter(redis, self._id, timeout=_SIGN_LIMIT)) as told:
                async for job_id in told:
                    if job_id is not None:
                        for watch in self._watches.values():
                            watch.stir(job_id)
                    elif not self._heard:
                        self._heard = True
                        for watch in self._watches.values():
                            watch.stir_all()
                    elif not self._watches:
                        return
        except UNREACHABLE:
            return  # the next look tries again
        finally:
            self._heard = False


class _Watch:
    """The jobs of one database that somebody here waits for."""

    def __init__(self, waiting: Waiting, engine: AsyncEngine) -> None:
        self._waiting = waiting
        self._engine = engine
        self._waits: dict[UUID, list[asyncio.Future[Stand]]] = {}
        self._unannounced: set[UUID] = set()
        self._stirred: set[UUID] = set()
        self._stir = asyncio.Event()
        self._task = asyncio.create_task(self._look_on(), name="exarq look")

    def add(self, job_id: UUID, ended: asyncio.Future[Stand]) -> None:
        self._waits.setdefault(job_id, []).append(ended)
        self._unannounced.add(job_id)
        self.stir(job_id)

    def remove(self, job_id: UUID, ended: asyncio.Future[Stand]) -> bool:
        """Somebody waits no longer; returns whether nobody does."""
        waits = self._waits.get(job_id, [])
        if ended in waits:
            waits.remove(ended)
        if not waits:
            self._waits.pop(job_id, None)
        if not self._waits and not self._task.get_loop().is_closed():
            self._task.cancel()
        return not self._waits

    def stir(self, job_id: UUID) -> None:
        """Look at this job now."""
        if job_id in self._waits:
            self._stirred.add(job_id)
            self._stir.set()

    def stir_all(self) -> None:
        """Announce and look at all."""
        self._unannounced.update(self._waits)
        self._stirred.update(self._waits)
        self._stir.set()

    def end(self, error: Exception) -> asyncio.Task[None]:
        """End all waits with this error; returns the task that is to be cancelled."""
        self._fail(list(self._waits), error)
        return self._task

    async def _look_on(self) -> None:
        next_net = time.monotonic() + NET.total_seconds()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(next_net - time.monotonic()):
                    await self._stir.wait()
            if time.monotonic() >= next_net:
                next_net = time.monotonic() + NET.total_seconds()
                self._waiting.listen()
                self.stir_all()
            self._stir.clear()
            unannounced, self._unannounced = self._unannounced & self._waits.keys(), set()
            stirred, self._stirred = self._stirred & self._waits.keys(), set()
            try:
                if unannounced:
                    await self._waiting.announce(self._engine, unannounced)
                if stirred:
                    self._tell(await look(self._engine, stirred))
            except Exception as error:
                if not is_transient(error):
                    self._fail(stirred, error)

    def _tell(self, stands: dict[UUID, Stand]) -> None:
        for job_id, stand in stands.items():
            if stand.has_ended:
                for ended in self._waits.pop(job_id, []):
                    if not ended.done():
                        ended.set_result(stand)

    def _fail(self, ids: Iterable[UUID], error: Exception) -> None:
        for job_id in ids:
            for ended in self._waits.pop(job_id, []):
                if not ended.done():
                    ended.set_exception(error)
