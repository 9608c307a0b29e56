"""Publish: put a hint into Redis and wake one waiting worker, after the commit and without keeping anyone waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Final, TypeAlias
from weakref import WeakKeyDictionary

from arq.connections import ArqRedis
from redis.exceptions import ResponseError

from worker.addresses import redis_url
from worker.broker import messages, scripts
from worker.broker.connection import connect
from worker.broker.hints import Hint
from worker.broker.messages import CancelAsked, EndAwaited, Message
from worker.flow.waiting import Waiting
from worker.observe.events import CancelNotTold, PublishFailed, emit
from worker.settings import Settings, load_settings

PUBLISHER: Final = "exarq.publisher"
"""The key of a session's `info` under which it finds its publisher."""

Publishable: TypeAlias = Hint | Message
"""What leaves for Redis after a commit; PostgreSQL has said the same before."""

_BUFFER_LIMIT: Final = 100_000
_BATCH: Final = 1_000
_SILENCE: Final = timedelta(seconds=5)
_ANNOUNCE_LIMIT: Final = timedelta(milliseconds=50)


class Publisher:
    """Sends hints in the background: losing one costs a delay until reconcile finds the job, never the job.

    So do messages: a worker finds with its next beat what it was not told, a waiter with its next look.

    Bind it once: `async_sessionmaker(engine, info=Publisher.from_settings().info)`, and close it at the end.

    Args:
        redis: the client to send with.
        lease: the worker's lease.
        closes_redis: whether closing the publisher closes the client.

    """

    def __init__(self, redis: ArqRedis, *, lease: timedelta, closes_redis: bool = False) -> None:
        self._redis = redis
        self._lease = lease
        self._closes_redis = closes_redis
        self._hears: ArqRedis | None = redis
        self._waitings: dict[asyncio.AbstractEventLoop, Waiting] = {}
        self._buffer: list[Publishable] = []
        self._sending: asyncio.Task[None] | None = None
        self._silent_until = 0.0

    @classmethod
    def from_settings(cls, settings: Settings | None = None) -> Publisher:
        """A publisher with a Redis client of its own, which connects at its first hint.

        Args:
            settings: where Redis is; without them, `load_settings()`.

        Raises:
            SettingsError: no Redis address is set.

        """
        settings = settings or load_settings()
        redis = connect(redis_url(settings), timeout=settings.redis.timeout)
        return cls(redis, lease=settings.worker.lease, closes_redis=True)

    @property
    def info(self) -> dict[str, Publisher]:
        """What the `info` of a session needs for its hints to go out here."""
        return {PUBLISHER: self}

    def publish(self, hints: Iterable[Publishable]) -> None:
        """Send these soon: all of one tick of the loop go together. Never raises, never waits."""
        if time.monotonic() < self._silent_until or len(self._buffer) >= _BUFFER_LIMIT:
            return
        self._buffer.extend(hints)
        if self._buffer and (self._sending is None or self._sending.done()):
            self._sending = asyncio.get_running_loop().create_task(self._send(), name="exarq publish")

    @property
    def waiting(self) -> Waiting:
        """Those that wait in this event loop for jobs to end, made when the first does."""
        loop = asyncio.get_running_loop()
        waiting = self._waitings.get(loop)
        if waiting is None:
            for closed in [known for known in self._waitings.copy() if known.is_closed()]:
                self._waitings.pop(closed, None)
            # A client's connections belong to one event loop; who waits in another looks at the rows.
            waiting = self._waitings[loop] = Waiting(None if self._waitings else self._hears, self._announce)
        return waiting

    async def flush(self) -> None:
        """Return when every hint so far was sent or given up."""
        while self._sending is not None and not self._sending.done():
            await asyncio.wait([self._sending])

    async def close(self) -> None:
        """Flush, end the waits of this event loop, and close the connection if it is the publisher's own.

        Who still waits for a result in this loop gets a `RuntimeError`; who waits in another goes on with their looks.
        """
        await self.flush()
        await self._end_waits()
        if self._closes_redis:
            await self._redis.aclose()

    async def _end_waits(self) -> None:
        waiting = self._waitings.pop(asyncio.get_running_loop(), None)
        if waiting is not None:
            await waiting.close()

    async def _announce(self, awaited: Iterable[EndAwaited]) -> None:
        """Tell the workers who waits for what, behind the hints of the same jobs; return once they know, or soon."""
        self.publish(awaited)
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANNOUNCE_LIMIT.total_seconds()):
                await self.flush()

    async def _send(self) -> None:
        while self._buffer:
            batch = self._buffer[:_BATCH]
            del self._buffer[:_BATCH]
            hints = [one for one in batch if isinstance(one, Hint)]
            told = [one for one in batch if not isinstance(one, Hint)]
            try:
                await scripts.publish(self._redis, hints, lease=self._lease)
                hints = []
                if told:
                    await self._tell(told)
            except Exception as error:  # its connections may be those of an event loop that has ended
                self._give_up([*hints, *told, *self._buffer], f"{type(error).__name__}: {error}")

    async def _tell(self, told: list[Message]) -> None:
        try:
            await messages.tell(self._redis, told)
        except ResponseError as error:  # this user may not have the channel; hints are another matter
            report_untold(told, f"{type(error).__name__}: {error}")

    def _give_up(self, unsent: list[Publishable], error: str) -> None:
        self._buffer.clear()
        self._silent_until = time.monotonic() + _SILENCE.total_seconds()
        report_unsent(unsent, error)


def report_unsent(unsent: Collection[Publishable], error: str) -> None:
    """Say how many hints reconcile has to bring, and which requests to cancel were not told."""
    if hints := sum(isinstance(one, Hint) for one in unsent):
        emit(PublishFailed(hints=hints, error=error))
    report_untold(unsent, error)


def report_untold(unsent: Iterable[Publishable], error: str) -> None:
    """Say which requests to cancel the workers were not told of; nothing else that is lost needs to be known."""
    if requests := sum(isinstance(one, CancelAsked) for one in unsent):
        emit(CancelNotTold(requests=requests, error=error))


_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Publisher] = WeakKeyDictionary()


def default_publisher() -> Publisher:
    """The publisher of this event loop, made from the settings when it is first needed.

    Raises: `SettingsError` when no Redis address is set.
    """
    loop = asyncio.get_running_loop()
    publisher = _of_loop.get(loop)
    if publisher is None:
        for closed in [known for known in _of_loop if known.is_closed()]:
            del _of_loop[closed]  # its publisher refers to it, so it would stay for ever
        publisher = _of_loop[loop] = Publisher.from_settings()
    return publisher


async def flush_hints() -> None:
    """Send what this event loop's own publisher still holds, and close it: for the end of a short program."""
    publisher = _of_loop.pop(asyncio.get_running_loop(), None)
    if publisher is not None:
        await publisher.close()
