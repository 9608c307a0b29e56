"""How jobs stand, for those who wait for them to end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, Text, Uuid, and_, any_, bindparam, cast, select
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.core.states import FINAL, Ending, JobState
from worker.db.models import Attempt, Job
from worker.db.statements.rows import by_key


@dataclass(frozen=True, slots=True)
class Stand:
    """One job as it stands; `result` is JSON text, `traceback` that of a failed job's last attempt."""

    id: UUID
    name: str
    state: JobState
    result: str | None
    error: str | None
    ending: Ending | None
    traceback: str | None
    attempt: int
    progress: dict[str, Any] | None

    @property
    def has_ended(self) -> bool:
        """Whether the state is final."""
        return self.state in FINAL


_STANDS = (
    select(
        Job.id,
        Job.name,
        Job.state,
        cast(Job.result, Text),
        Job.error,
        Attempt.ending,
        Attempt.traceback,
        Job.attempt,
        Job.progress,
    )
    .outerjoin_from(
        Job, Attempt, and_(by_key(Attempt.job_id, Job.id), Attempt.token == Job.token, Job.state == JobState.FAILED)
    )
    .where(Job.id == any_(bindparam("ids", type_=ARRAY(Uuid))))
)


async def stands(connection: AsyncConnection, ids: Collection[UUID]) -> dict[UUID, Stand]:
    """How these jobs stand; an id without a row is left out."""
    rows = await connection.execute(_STANDS, {"ids": list(ids)})
    return {row.id: _stand(row) for row in rows}


def _stand(row: Any) -> Stand:
    id_, name, state, result, error, ending, traceback, attempt, progress = row
    last = Ending(ending) if ending is not None else None
    return Stand(id_, name, JobState(state), result, error, last, traceback, attempt, progress)
