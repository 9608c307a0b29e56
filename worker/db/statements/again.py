"""Final → queued: a person wants the job once more."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Float,
    Select,
    Text,
    Update,
    Uuid,
    and_,
    any_,
    bindparam,
    case,
    cast,
    exists,
    false,
    func,
    literal,
    null,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import aliased

from worker.core.states import FINAL, Ending, JobState
from worker.db.models import UNIQUE_WHILE, Attempt, Installation, Job, constant
from worker.db.statements.rows import WANTED_STATE, asked_after, by_key, given_ids


def _would_hold_its_key() -> ColumnElement[bool]:
    """Whether the job, waiting again, keeps others from its key: the rest of `UNIQUE_WHILE`."""
    holds = or_(Job.unique_until.is_not(None), Job.attempt == 0, Job.unique_for == "until_done")
    return and_(Job.unique_key.is_not(None), func.coalesce(holds, false()))


def _key_is_taken() -> ColumnElement[bool]:
    """Whether another job holds this one's unique key."""
    other = aliased(Job)
    same = and_(other.name == Job.name, other.unique_key == Job.unique_key, other.id != Job.id)
    # Bare names are those of the innermost table, the other job.
    return exists().where(same, text(f"({UNIQUE_WHILE})"))


def _free_statement() -> Update:
    mine = aliased(Job)
    over = (
        select(Job.id)
        .join(mine, and_(mine.name == Job.name, mine.unique_key == Job.unique_key, mine.id != Job.id))
        .where(
            mine.id == any_(bindparam("ids", type_=ARRAY(Uuid))),
            Job.unique_until <= func.statement_timestamp(),
            Job.state.in_([constant(state) for state in sorted(FINAL)]),
        )
        .with_for_update(key_share=True, of=Job, skip_locked=True)
        .cte("over")
    )
    return update(Job).where(by_key(Job.id, over.c.id)).values(unique_until=null())


FREE_FOR = _free_statement()


def _retry_statement(*, waits: bool) -> Select[Any]:
    final = Job.state.in_([constant(state) for state in sorted(FINAL)])
    locked = (
        given_ids(waits=waits)
        .add_columns(
            Job.state,
            Job.token,
            Job.attempt,
            Job.worker_id,
            Job.started_at,
            Job.finished_at,
            and_(_would_hold_its_key(), _key_is_taken()).label("taken"),
            _would_hold_its_key().label("holds"),
            asked_after().label("young"),
            and_(final, WANTED_STATE).label("wanted"),
            Job.name,
            Job.queue,
            Job.priority,
            Job.unique_key,
            cast(func.extract("epoch", Job.enqueued_at) * 1000, Float).label("enqueued_ms"),
        )
        .cte("locked")
    )
    # Of several with one key the newest gets it.
    rivals = (locked.c.name, locked.c.unique_key, locked.c.holds, locked.c.wanted, locked.c.young)
    rank = func.row_number().over(partition_by=rivals, order_by=locked.c.id.desc())
    beaten = or_(locked.c.taken, and_(locked.c.holds, rank > 1))
    ranked = select(locked, and_(locked.c.wanted, beaten).label("refused")).cte("ranked")
    now = func.clock_timestamp()
    moved = (
        update(Job)
        .where(by_key(Job.id, ranked.c.id), ranked.c.wanted, ~ranked.c.young, ~ranked.c.refused)
        .values(
            state=literal(JobState.QUEUED.value),
            run_at=now,
            first_due_at=now,
            failures=0,
            contended=0,
            crashes=0,
            cancel_requested=False,
            token=null(),
            worker_id=null(),
            finished_at=null(),
            progress=null(),
            result=null(),
            error=null(),
            expires_at=case((Job.expires_at > now, Job.expires_at)),
        )
        .returning(Job.id)
        .cte("moved")
    )
    # The success is forgotten on the row; that the attempt took place is not.
    succeeded = (
        insert(Attempt)
        .from_select(
            ["job_id", "token", "number", "worker_id", "started_at", "finished_at", "ending"],
            select(
                locked.c.id,
                locked.c.token,
                locked.c.attempt,
                locked.c.worker_id,
                locked.c.started_at,
                locked.c.finished_at,
                literal(Ending.SUCCEEDED.value, Text),
            ).where(
                locked.c.state == constant(JobState.SUCCEEDED),
                locked.c.token.is_not(None),
                locked.c.id.in_(select(moved.c.id)),
            ),
            include_defaults=False,
        )
        .on_conflict_do_nothing()
        .cte("succeeded")
    )
    return (
        select(
            ranked.c.id,
            ranked.c.state,
            moved.c.id.is_not(None),
            ranked.c.refused,
            ranked.c.young,
            ranked.c.name,
            ranked.c.queue,
            ranked.c.enqueued_ms,
            select(Installation.id).scalar_subquery(),
            ranked.c.priority,
        )
        .join(moved, moved.c.id == ranked.c.id, isouter=True)
        .add_cte(succeeded)
    )


RETRY = _retry_statement(waits=True)
RETRY_MANY = _retry_statement(waits=False)
