"""Behind a pooler: whether one worker gets as many backends as its jobs and its own statements need at once."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.cli.doctor.finding import Finding, ok, warning
from worker.db.engine import jobs_engine
from worker.db.failures import is_away
from worker.resources import connections_of
from worker.settings import Settings

# Others wait meanwhile, so it is far below a lease.
_PATIENCE: Final = timedelta(seconds=2)

_MAKE_ROOM: Final = (
    "raise pgbouncer's default_pool_size (or pool_size) to the sum of all workers, or lower worker.concurrency: jobs"
    " that hold every backend keep their worker from beating, which cancels them"
)


async def look(settings: Settings, url: str) -> Finding:
    """Open as many transactions at once as a worker may, each of which has a backend of its own."""
    wanted = connections_of(settings.worker.concurrency)
    engine = jobs_engine(
        url,
        application_name=lambda: "exarq doctor",
        connections=wanted,
        connect_timeout=settings.database.connect_timeout,
        pooler=settings.database.pooler,
    )
    try:
        given = await _given(engine, wanted)
    finally:
        await engine.dispose()
    said = f"a worker with concurrency {settings.worker.concurrency} may use {wanted} backends at once"
    if given < wanted:
        return warning("connections", f"{said}, the pooler had {given} left", _MAKE_ROOM)
    return ok("connections", f"{said}, the pooler has them")


async def _given(engine: AsyncEngine, wanted: int) -> int:
    """How many backends are to be had, up to `wanted`."""
    async with AsyncExitStack() as held:
        for given in range(wanted):
            try:
                async with asyncio.timeout(_PATIENCE.total_seconds()):
                    connection = await held.enter_async_context(engine.connect())
                    await connection.execute(text("SELECT 1"))
            except Exception as full:
                if not is_away(full):
                    raise
                return given
    return wanted
