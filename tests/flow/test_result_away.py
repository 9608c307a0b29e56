"""A result that is asked for while PostgreSQL is away."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from tests.proxy import postgres_proxy
from tests.support import a_job
from worker.core.errors import ResultTimeout
from worker.flow.handle import handle_of

pytestmark = pytest.mark.leaves_running


@pytest.mark.parametrize("timeout", [0, 0.2])
async def test_a_timeout_while_postgresql_is_away_says_so(
    engine: AsyncEngine, sessions: async_sessionmaker[AsyncSession], database_url: str, timeout: float
) -> None:
    job = await a_job(engine)
    async with postgres_proxy(database_url) as (proxy, url):
        through = create_async_engine(url)
        handle = handle_of(AsyncSession(through, info=sessions.kw["info"]), job)
        proxy.refuse()

        with pytest.raises(ResultTimeout, match=r"PostgreSQL does not answer .*; ask again"):
            await handle.result(timeout=timeout)

        await through.dispose()
