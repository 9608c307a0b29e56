"""ARQ's Redis client, with a limit on every wait."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, Final

from arq.connections import ArqRedis
from redis.asyncio import BlockingConnectionPool
from redis.exceptions import RedisError

UNREACHABLE: Final = (RedisError, OSError, TimeoutError)
"""What a Redis that is away, silent or restarting raises."""


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
    redis = ArqRedis(pool_or_conn=pool, job_serializer=_serialize, job_deserializer=json.loads)
    redis.auto_close_connection_pool = True
    return redis


def _serialize(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
