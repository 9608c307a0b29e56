"""Queued → running: by primary key, and by a scan."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Integer,
    Interval,
    Select,
    Text,
    Update,
    Uuid,
    and_,
    any_,
    bindparam,
    case,
    cast,
    func,
    literal,
    or_,
    select,
    update,
)

from worker.core.blame import SUSPECT_FROM
from worker.core.priority import DEFAULT_PRIORITY, STEP
from worker.core.states import JobState
from worker.db.models import Job, constant, stands_in


def _claim_statement(due: Select[UUID, int]) -> Update:
    locked = due.with_for_update(key_share=True, skip_locked=True).cte("due")
    suspect = (locked.c.crashes >= SUSPECT_FROM).label("suspect")
    rank = func.row_number().over(partition_by=suspect, order_by=locked.c.id).label("rank")
    picked = select(locked.c.id, suspect, rank).cte("picked")
    innocent_or_alone = or_(~picked.c.suspect, and_(picked.c.rank == 1, bindparam("may_take_suspect")))
    return (
        update(Job)
        .where(Job.id == any_(func.array(select(picked.c.id).where(innocent_or_alone).scalar_subquery())))
        .values(
            state=JobState.RUNNING,
            token=bindparam("new_token", type_=Uuid),
            worker_id=bindparam("me", type_=Uuid),
            attempt=Job.attempt + 1,
            started_at=func.clock_timestamp(),
        )
        .returning(
            Job.id,
            Job.name,
            Job.queue,
            cast(Job.args, Text),
            Job.attempt,
            Job.failures,
            Job.crashes,
            Job.contended,
            Job.enqueued_at,
            (func.clock_timestamp() - Job.first_due_at).cast(Interval),
            case((Job.expires_at < func.statement_timestamp(), Job.expires_at)),
        )
    )


_is_due = Job.run_at <= func.statement_timestamp()
CLAIM_BY_ID = _claim_statement(
    select(Job.id, Job.crashes)
    .where(Job.id == any_(bindparam("ids", type_=ARRAY(Uuid))), stands_in(JobState.QUEUED), _is_due)
    .order_by(Job.id)
)

# Which of the longest due is first by rank: all that wait may be many.
_WINDOW: Final = 1_000
_longest_due = (
    select(Job.id)
    .where(
        Job.queue == any_(bindparam("queues", type_=ARRAY(Text))),
        Job.state == constant(JobState.QUEUED),
        _is_due,
        or_(Job.crashes < SUSPECT_FROM, bindparam("may_take_suspect")),
    )
    .order_by(Job.run_at, Job.id)
)
_rank = Job.run_at + (Job.priority - DEFAULT_PRIORITY) * literal(STEP, Interval)
CLAIM_BY_SCAN = _claim_statement(
    select(Job.id, Job.crashes)
    .where(
        Job.id == any_(func.array(_longest_due.limit(literal(_WINDOW)).scalar_subquery())),
        stands_in(JobState.QUEUED),
        _is_due,
    )
    .order_by(_rank, Job.id)
    .limit(bindparam("room", type_=Integer))
)
# Where other transactions hold the whole window, what comes behind it.
CLAIM_BEHIND = _claim_statement(_longest_due.add_columns(Job.crashes).limit(bindparam("room", type_=Integer)))
