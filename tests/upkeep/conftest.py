"""What the tests of listening start from."""

from __future__ import annotations

from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cancelling import beating_seldom, execute, installation_of
from worker.settings import Settings


@pytest.fixture
def seldom(settings: Settings) -> Settings:
    """A worker that beats only long after the test has given up."""
    return beating_seldom(settings)


@pytest.fixture
async def installation(engine: AsyncEngine) -> UUID:
    """Whose channel the workers listen to."""
    return await installation_of(engine)


@pytest.fixture
async def note_table(engine: AsyncEngine) -> None:
    """An empty table for what jobs write."""
    await execute(engine, "CREATE TABLE note (word text UNIQUE)")
