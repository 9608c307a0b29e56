"""What `exarq.enqueue(…)` tells at its commit, heard by one process at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

CHANNEL: Final = "exarq"
_LOCK: Final = 0x6578617272  # "exarr"; the migration's is "exarq"
_MOST: Final = 100_000


NOBODY_HEARS: Final = func.pg_try_advisory_xact_lock(_LOCK)
"""Whether nobody listens; the question takes the lock until its transaction ends, so it should end at once."""


async def told(engine: AsyncEngine) -> AsyncGenerator[list[UUID], None]:
    """The ids that are told from now on, those of one moment together; none where another process listens.

    Ends when the connection does. Anybody may notify: an id need not be one of a job.

    Args:
        engine: for one connection, which is of no other use afterwards.

    """
    ids: list[UUID] = []
    something = asyncio.Event()

    def hear(_connection: Any, _pid: int, _channel: str, payload: object) -> None:
        with suppress(ValueError):
            if len(ids) < _MOST:  # reconcile brings the others
                ids.append(UUID(str(payload)))
        something.set()

    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        if not (await connection.execute(select(func.pg_try_advisory_lock(_LOCK)))).scalar_one():
            return
        driver: Any = (await connection.get_raw_connection()).driver_connection
        driver.add_termination_listener(lambda _: something.set())
        await driver.add_listener(CHANNEL, hear)
        while not driver.is_closed():
            await something.wait()
            something.clear()
            batch, ids[:] = ids[:], []
            if batch:
                yield batch
