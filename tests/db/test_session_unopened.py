"""The session of a job that never uses it costs nothing, and one that is used late is as any other."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from worker.db.session import AttemptSession, is_opened, make_sessions


def test_a_session_that_nobody_uses_makes_none_of_sqlalchemys(engine: AsyncEngine) -> None:
    session = make_sessions(engine, {})()

    assert isinstance(session, AsyncSession)
    assert not is_opened(session)
    assert "sync_session" not in vars(session)


async def test_its_first_use_makes_it_whole(engine: AsyncEngine) -> None:
    session = make_sessions(engine, {"who": "me"})()

    async with session.begin():
        assert await session.scalar(text("SELECT 1")) == 1

    assert is_opened(session)
    assert isinstance(session.sync_session, AttemptSession)
    assert session.info["who"] == "me"


def test_what_it_does_not_have_it_does_not_have(engine: AsyncEngine) -> None:
    session = make_sessions(engine, {})()

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = session.nothing  # type: ignore[attr-defined]
