"""A table for what jobs write."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine


@pytest.fixture
async def note_table(engine: AsyncEngine) -> None:
    """An empty table `note (word text)`, whose words are unique."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE note (word text UNIQUE DEFERRABLE INITIALLY IMMEDIATE)"))
