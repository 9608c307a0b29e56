"""A result that can never come, because the transaction that enqueued was rolled back."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.flow.helpers import NAME
from worker.core.errors import NotCommitted, ResultTimeout
from worker.flow.enqueue import enqueue

Sessions = async_sessionmaker[AsyncSession]


@pytest.mark.parametrize("by", ["rollback", "close"])
async def test_a_result_of_what_was_rolled_back_is_refused_at_once(sessions: Sessions, by: str) -> None:
    async with sessions() as session:
        handle = await enqueue(session, NAME)
        if by == "rollback":
            await session.rollback()

    with pytest.raises(NotCommitted, match="was rolled back, so there is no such job"):
        await handle.result()


@pytest.mark.leaves_hints
async def test_what_was_committed_before_or_exists_all_the_same_is_waited_for(sessions: Sessions) -> None:
    async with sessions() as session:
        committed = await enqueue(session, NAME, key="one")
        await session.commit()
        await enqueue(session, NAME)
        exists = await enqueue(session, NAME, key="one")
        await session.rollback()

    for handle in (committed, exists):
        with pytest.raises(ResultTimeout, match="it is queued"):
            await handle.result(timeout=0)
