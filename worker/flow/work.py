"""What a run needs of the worker it runs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from worker.core.registry import Registry
from worker.db.kept import Kept
from worker.flow.awaited import Awaited
from worker.flow.flush import Flusher
from worker.flow.holdings import Holdings
from worker.flow.mirror import Mirror
from worker.flow.progress import Reports
from worker.flow.publish import Publisher
from worker.settings import Settings


@dataclass(slots=True)
class Identity:
    """Which worker this process is; a worker that was given up starts anew under another id."""

    id: UUID

    @property
    def application_name(self) -> str:
        """What its database connections are called, so that a rescuer can end them."""
        return f"exarq {self.id}"


@dataclass(slots=True)
class Counts:
    """What this process has done since it started."""

    succeeded: int = 0
    failed: int = 0
    retried: int = 0
    released: int = 0


@dataclass(slots=True)
class Work:
    """The worker's parts, opened at start and handed to every step."""

    settings: Settings
    registry: Registry
    identity: Identity
    installation: UUID
    jobs_engine: AsyncEngine
    sessions: async_sessionmaker[AsyncSession]
    processor: AsyncEngine
    claims: Kept
    publisher: Publisher
    holdings: Holdings
    flusher: Flusher
    awaited: Awaited
    reports: Reports
    mirror: Mirror
    counts: Counts
    context: Mapping[str, Any]
