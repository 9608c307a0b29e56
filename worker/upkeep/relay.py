"""Relay: publish what is enqueued by SQL as soon as its transaction tells, so that it need not wait for reconcile.

Only who has the lock listens; when that connection ends, however it does, the next sweep of any worker finds the lock
free and calls for another. Nobody hears behind a pooler: reconcile goes its round each second there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import timedelta
from typing import Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from worker.db import notifications, reads
from worker.db.send import once
from worker.flow.after_commit import HORIZON
from worker.flow.work import Work
from worker.upkeep.reconcile import hints_of

OpenEngine = Callable[[], AbstractAsyncContextManager[AsyncEngine]]
_PAGE: Final = 1_000


async def relay(work: Work, open_engine: OpenEngine) -> timedelta | None:
    """Listen and publish for as long as the connection lasts; return at once where another process does."""
    if work.settings.database.pooler:
        return None
    async with open_engine() as engine, aclosing(notifications.told(engine)) as told:
        async for ids in told:
            for start in range(0, len(ids), _PAGE):
                await _publish(work, ids[start : start + _PAGE])
    return None


async def _publish(work: Work, ids: list[UUID]) -> None:
    """PostgreSQL says what they are: a notification is only a hint."""
    jobs = await once(work.processor, lambda connection: reads.waiting_among(connection, ids, horizon=HORIZON))
    work.publisher.publish(hints_of(work, jobs))
