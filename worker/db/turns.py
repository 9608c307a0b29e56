"""Steps of upkeep that all workers share: whoever comes first takes the turn, for one short transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.db.models import Upkeep

WALK: Final = "reconcile"
"""The step that walks over the waiting jobs, so that nobody need take it while none waits."""

CLOCK: Final = "schedule"
"""The step that enqueues what the clock says: no turn, for each tick is taken by itself."""

RELAY: Final = "relay"
"""The step that hears what is enqueued by SQL: no turn, but a lock for as long as it hears."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a walk over the waiting jobs came."""

    run_at: datetime
    job_id: UUID


@dataclass(frozen=True, slots=True)
class Turn:
    """A step that is due and that nobody else takes until this transaction ends."""

    step: str
    after: Position | None


async def take(connection: AsyncConnection, step: str) -> Turn | None:
    """The step's turn; None when it is not due or another worker has it."""
    query = (
        select(Upkeep.after_run_at, Upkeep.after_id)
        .where(Upkeep.step == step, Upkeep.due_at <= func.clock_timestamp())
        .with_for_update(skip_locked=True)
    )
    row = (await connection.execute(query)).first()
    if row is None:
        return None
    after = None if row.after_id is None else Position(row.after_run_at, row.after_id)
    return Turn(step, after)


async def end(connection: AsyncConnection, turn: Turn, *, rest: timedelta, after: Position | None = None) -> None:
    """The step is due again after `rest`, and goes on behind `after`."""
    await connection.execute(
        update(Upkeep)
        .where(Upkeep.step == turn.step)
        .values(
            due_at=func.clock_timestamp() + rest,
            after_run_at=after.run_at if after else None,
            after_id=after.job_id if after else None,
        )
    )
