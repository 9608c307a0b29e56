"""ARQ's Redis client, with a limit on every wait."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Final

from arq.connections import ArqRedis
from redis import Redis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer
from redis.exceptions import ConnectionError as RedisWentAway
from redis.exceptions import RedisError
from redis.retry import Retry

from worker.core.errors import SettingsError
from worker.settings.values import masked

UNREACHABLE: Final = (RedisError, OSError, TimeoutError)
"""What a Redis that is away, silent or restarting raises."""


_SURELY_BUFFERED: Final = 16 * 1024  # so much waits for the kernel without anybody waiting for it


class _Direct(AbstractConnection):
    """Sees for itself what redis-py asks the event loop for, a turn of it each time: a third of a short command."""

    async def can_read_destructive(self) -> bool:
        """Whether something came unasked; raises where the connection has ended."""
        reader, writer = self._reader, self._writer
        if reader is None or writer is None or reader.at_eof() or reader.exception() or writer.is_closing():
            return bool(await super().can_read_destructive())  # type: ignore[no-untyped-call]
        return bool(reader._buffer or self._parser._reader.has_data())  # type: ignore[attr-defined]

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        """Send what is packed; before Python 3.12 a time limit is a task, and most commands wait for nothing."""
        if self._writer is None or not isinstance(command, list):
            await super().send_packed_command(command, check_health)
            return
        if check_health:
            await self.check_health()  # type: ignore[no-untyped-call]
        self._writer.writelines(command)
        if self._writer.transport.get_write_buffer_size() > _SURELY_BUFFERED:
            await super().send_packed_command([], check_health=False)

    def pack_command(self, *args: Any) -> list[bytes]:
        """Pack in C, as the sync client does."""
        return HiredisRespSerializer().pack(*args)  # type: ignore[no-any-return]


def connect(url: str, *, timeout: timedelta, connections: int = 20) -> ArqRedis:
    """A client that connects at its first use; `timeout` limits each connect and each answer."""
    seconds = timeout.total_seconds()
    pool: Any = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=seconds,
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        **({} if url.startswith("unix") else {"socket_keepalive": True}),
    )
    pool.connection_class = type("DirectConnection", (_Direct, pool.connection_class), {})
    redis = ArqRedis(pool_or_conn=pool, job_serializer=_serialize, job_deserializer=json.loads)
    redis.auto_close_connection_pool = True
    return redis


async def require_database(redis: ArqRedis, url: str) -> None:
    """See that the Redis has the database that its address names; one that is away may have it.

    Raises: `SettingsError` where it has not.
    """
    try:
        await redis.ping()
    except UNREACHABLE as error:  # through a unix socket it is no ResponseError
        if "DB index" in str(error):
            raise SettingsError(
                f"redis.url, {masked(url)}, names a database that this Redis does not have ({error});"
                " name one from 0 on, by default up to 15, or raise `databases` in its configuration"
            ) from None


def connect_now(url: str, *, timeout: timedelta) -> Redis:
    """A client for a program without an event loop; its connections are made anew after a fork."""
    seconds = timeout.total_seconds()
    client: Redis = Redis.from_url(
        url,
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        # A pooled connection may have ended with the Redis it was to.
        retry=Retry(NoBackoff(), 1),
        retry_on_error=[RedisWentAway],
    )
    return client


def _serialize(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
