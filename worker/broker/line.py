"""A connection of the publisher's own: a pooled one is looked at, and timed step by step, each time it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

from arq.connections import ArqRedis
from redis.exceptions import ConnectionError as RedisWentAway
from redis.exceptions import ResponseError

Command: TypeAlias = tuple[str | int, ...]


class Line:
    """Sends commands that may be repeated over one connection, which is taken from the client's pool and kept.

    One call at a time.

    Args:
        redis: the client whose connection it is; its time limit holds for a whole call.

    """

    def __init__(self, redis: ArqRedis) -> None:
        self._pool = redis.connection_pool
        self._limit: float | None = self._pool.connection_kwargs.get("socket_timeout")
        self._connection: Any = None

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, refusals among them; raises what `worker.broker.connection.UNREACHABLE` knows."""
        async with asyncio.timeout(self._limit):
            if self._connection is None:
                self._connection = await self._pool.get_connection()
                self._connection.socket_timeout = None  # ours is over all
            packed = self._connection.pack_commands(commands)
            try:
                return await self._exchange(packed, len(commands))
            except RedisWentAway:  # perhaps long ago
                return await self._exchange(packed, len(commands))

    async def close(self) -> None:
        """Give the connection back to the pool, ended, so that nothing of a call is left on it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect()
            connection.socket_timeout = self._limit
            await self._pool.release(connection)

    async def _exchange(self, packed: Sequence[bytes], count: int) -> list[Any]:
        await self._connection.send_packed_command(packed, check_health=False)
        return [await self._reply() for _ in range(count)]

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response()
        except ResponseError as refusal:
            return refusal
