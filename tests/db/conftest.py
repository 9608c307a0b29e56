"""A worker's parts, and statements counted where they are sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.db.session_cases import Base
from tests.support import a_work
from worker.flow.work import Work
from worker.settings import Settings


@pytest.fixture
async def work(settings: Settings) -> AsyncIterator[Work]:
    """A worker's parts; nothing beats and nothing is claimed by itself."""
    async with a_work(settings) as work:
        yield work


@pytest.fixture
async def note_table(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@contextmanager
def statements_of(engine: AsyncEngine) -> Iterator[list[str]]:
    """The statements sent through this engine while the block lasts."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)
