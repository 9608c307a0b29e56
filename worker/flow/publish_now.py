"""Publish from a program without an event loop: in the thread that committed, which waits a moment at the most."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from typing import Final

from redis import Redis
from redis.exceptions import ResponseError

from worker.addresses import redis_url
from worker.broker import messages, scripts
from worker.broker.connection import UNREACHABLE, connect_now
from worker.broker.hints import Hint
from worker.flow.publish import PUBLISHER, Publishable, report_untold
from worker.observe.events import PublishFailed, emit
from worker.settings import Settings, load_settings

_BATCH: Final = 1_000
_ANSWER_LIMIT: Final = timedelta(milliseconds=50)
_SILENCE: Final = timedelta(seconds=5)


class SyncPublisher:
    """Sends hints and messages right after the commit of a sync session; what it cannot send, reconcile brings.

    Bind it once: `sessionmaker(engine, info=SyncPublisher.from_settings().info)`; without one, each process makes its
    own from the settings. Threads may share it, and processes that were forked after it was made.

    Args:
        redis: the client to send with; its time limits say how long a commit may be kept waiting.
        lease: the worker's lease.

    """

    def __init__(self, redis: Redis, *, lease: timedelta) -> None:
        self._redis = redis
        self._lease = lease
        self._silent_until = 0.0

    @classmethod
    def from_settings(cls, settings: Settings | None = None) -> SyncPublisher:
        """A publisher with a client of its own, which connects at its first hint and waits 50 ms for an answer.

        Args:
            settings: where Redis is; without them, `load_settings()`.

        Raises:
            SettingsError: no Redis address is set.

        """
        settings = settings or load_settings()
        return cls(connect_now(redis_url(settings), timeout=_ANSWER_LIMIT), lease=settings.worker.lease)

    @property
    def info(self) -> dict[str, SyncPublisher]:
        """What the `info` of a session needs for its hints to go out here."""
        return {PUBLISHER: self}

    def publish(self, published: Iterable[Publishable]) -> None:
        """Send these now; never raises, and after a failure does not try for some seconds."""
        unsent = list(published)
        if not unsent or time.monotonic() < self._silent_until:
            return
        hints = [one for one in unsent if isinstance(one, Hint)]
        told = [one for one in unsent if not isinstance(one, Hint)]
        try:
            while hints:
                scripts.publish_now(self._redis, hints[:_BATCH], lease=self._lease)
                hints = hints[_BATCH:]
            messages.tell_now(self._redis, told)
        except UNREACHABLE as error:
            if not isinstance(error, ResponseError):  # this user may not have the channel
                self._silent_until = time.monotonic() + _SILENCE.total_seconds()
            said = f"{type(error).__name__}: {error}"
            if hints:
                emit(PublishFailed(hints=len(hints), error=said))
            report_untold(told, said)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


@cache
def default_sync_publisher() -> SyncPublisher:
    """The publisher of this process, made from the settings when it is first needed.

    Raises: `SettingsError` when no Redis address is set.
    """
    return SyncPublisher.from_settings()
