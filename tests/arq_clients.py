"""Plain ARQ's own client, as code has it that was never changed for Exarq."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import arq
from arq.connections import ArqRedis, RedisSettings


@asynccontextmanager
async def a_stock_pool(redis_url: str, **options: Any) -> AsyncIterator[ArqRedis]:
    """What `arq.create_pool` makes, closed at the end of the block."""
    pool = await arq.create_pool(RedisSettings.from_dsn(redis_url), **options)
    try:
        yield pool
    finally:
        await pool.aclose()
