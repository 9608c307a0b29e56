"""A connection of the publisher's own: a pooled one is looked at, and timed step by step, each time it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from arq.connections import ArqRedis
from redis.exceptions import ConnectionError as RedisWentAway
from redis.exceptions import ResponseError

Command: TypeAlias = tuple[str | int, ...]


class Line:
    """Sends commands that may be repeated over one connection, made as the client's pool makes its own, and kept.

    One call at a time, from whichever event loop runs.

    Args:
        redis: the client whose servers and settings they are; its time limit holds for a whole call.

    """

    def __init__(self, redis: ArqRedis) -> None:
        self._pool = redis.connection_pool
        self._limit: float | None = self._pool.connection_kwargs.get("socket_timeout")
        self._connection: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, refusals among them; raises what `worker.broker.connection.UNREACHABLE` knows."""
        async with asyncio.timeout(self._limit):
            if self._loop is not asyncio.get_running_loop():
                await self._begin_anew()
            packed = self._connection.pack_commands(commands)
            try:
                return await self._exchange(packed, len(commands))
            except RedisWentAway:  # perhaps long ago
                return await self._exchange(packed, len(commands))

    async def close(self) -> None:
        """End the connection."""
        connection, self._connection, self._loop = self._connection, None, None
        if connection is not None:
            with suppress(RuntimeError):  # the event loop that it belonged to has ended
                await connection.disconnect()

    async def _begin_anew(self) -> None:
        await self.close()
        self._connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        self._connection.socket_timeout = None  # ours is over all
        self._loop = asyncio.get_running_loop()

    async def _exchange(self, packed: Sequence[bytes], count: int) -> list[Any]:
        await self._connection.send_packed_command(packed, check_health=False)
        return [await self._reply() for _ in range(count)]

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response()
        except ResponseError as refusal:
            return refusal
