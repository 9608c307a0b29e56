"""How adopted jobs stand, for what plain ARQ's clients are shown of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Interval,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    cast,
    func,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.core.states import FINAL, JobState
from worker.db.models import ADOPTED, Job
from worker.db.statements.rows import given_rows


@dataclass(frozen=True, slots=True)
class Adopted:
    """One adopted job as it stands; `result` is JSON text, `wait` is negative when it is overdue."""

    id: UUID
    name: str
    queue: str
    state: JobState
    wait: timedelta
    attempt: int
    priority: int
    enqueued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    result: str | None
    error: str | None
    arq_id: str
    arq_enqueued: int

    @property
    def has_ended(self) -> bool:
        """Whether the state is final."""
        return self.state in FINAL


_STANDS = select(
    Job.id,
    Job.name,
    Job.queue,
    Job.state,
    (Job.run_at - func.statement_timestamp()).cast(Interval),
    Job.attempt,
    Job.priority,
    Job.enqueued_at,
    Job.started_at,
    Job.finished_at,
    cast(Job.result, Text),
    Job.error,
    Job.arq_id,
    Job.arq_enqueued,
).where(text(ADOPTED))

_BY_ID = _STANDS.where(Job.id == any_(bindparam("ids", type_=ARRAY(Uuid))))

_given = given_rows(("of_arq_id", Text), ("of_arq_enqueued", BigInteger))
_that_enqueue = (
    _STANDS.where(
        Job.arq_id == _given.c.of_arq_id,
        or_(
            Job.arq_enqueued == _given.c.of_arq_enqueued,
            and_(
                _given.c.of_arq_enqueued.is_(None),
                or_(
                    Job.finished_at.is_(None),
                    Job.finished_at > func.statement_timestamp() - bindparam("told_for", type_=Interval),
                ),
            ),
        ),
    )
    .order_by(Job.arq_enqueued.desc())
    .limit(1)
    .lateral("that")
)
_BY_ENQUEUE = select(_that_enqueue).select_from(_given.join(_that_enqueue, true()))


async def by_id(connection: AsyncConnection, ids: Collection[UUID]) -> list[Adopted]:
    """Those of these jobs that there are."""
    return _adopted(await connection.execute(_BY_ID, {"ids": list(ids)}))


async def by_enqueue(
    connection: AsyncConnection, enqueues: Sequence[tuple[str, int | None]], *, told_for: timedelta
) -> dict[str, Adopted]:
    """The job of each ARQ id and enqueue time that was adopted.

    Args:
        connection: to ask on.
        enqueues: the ids; without a time, the latest job is meant, unless it has ended so long ago that it is not.
        told_for: for how long ARQ's clients are told of what has ended.

    """
    given = {"of_arq_id": [id_ for id_, _ in enqueues], "of_arq_enqueued": [time for _, time in enqueues]}
    found = await connection.execute(_BY_ENQUEUE, {**given, "told_for": told_for})
    return {one.arq_id: one for one in _adopted(found)}


def _adopted(rows: Any) -> list[Adopted]:
    return [Adopted(id_, name, queue, JobState(state), *others) for id_, name, queue, state, *others in rows]
