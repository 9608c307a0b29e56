"""The plugin's session under a short name."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncSession


@pytest.fixture
def session(exarq_session: AsyncSession) -> AsyncSession:
    return exarq_session
