"""The jobs that have a key: found, replaced until they start, parted from it when their time is over."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Interval,
    Text,
    Update,
    Uuid,
    bindparam,
    case,
    cast,
    func,
    literal,
    null,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from worker.core.states import FINAL, JobState
from worker.db.models import UNIQUE_WHILE, Job, constant, stands_in
from worker.db.statements.enqueue import PLACED, given_calls, told
from worker.db.statements.rows import by_key

_TABLE: Any = Job.__table__
_NOW: ColumnElement[Any] = func.clock_timestamp()
_TIME_IS_OVER = (Job.unique_until <= _NOW) & Job.state.in_([constant(state) for state in sorted(FINAL)])
_EXPIRED = (Job.state == constant(JobState.QUEUED)) & (Job.expires_at < _NOW)


def _find_statement() -> Any:
    """The jobs that have these keys; those that are to be replaced and can be are held as they are now."""
    given = given_calls({"wanted_name": Text, "wanted_key": Text, "to_replace": Boolean})
    replaceable = given.c.to_replace & (Job.state == constant(JobState.QUEUED)) & (Job.attempt == 0)
    having = (
        select(
            Job.name,
            Job.unique_key,
            Job.state,
            Job.queue,
            Job.priority,
            replaceable.label("replaceable"),
            func.coalesce(or_(_TIME_IS_OVER, _EXPIRED & ~replaceable), False).label("over"),
            *told(_TABLE),
        )
        .join(given, (Job.name == given.c.wanted_name) & (Job.unique_key == given.c.wanted_key))
        .where(text(UNIQUE_WHILE))
    )
    held = (
        having.where(replaceable).order_by(Job.name, Job.unique_key).with_for_update(of=Job, key_share=True).cte("held")
    )
    return union_all(select(held), having.where(~replaceable))


FIND = _find_statement()


# ── queued → queued ─────────────────────────────────────────────────────────────────────────────────────────────────


def _replace_statement() -> Any:
    """The caller has found and holds these rows, so they need no other order."""
    given = given_calls({"id": Uuid, "args": Text, **PLACED, "longest": Interval})
    wanted = func.coalesce(given.c.at, func.clock_timestamp() + given.c.delay)
    # least() leaves out what is null: no bound.
    due = func.least(wanted, Job.enqueued_at + given.c.longest).label("due")
    placed = select(*given.c, due).join(_TABLE, by_key(_TABLE.c.id, given.c.id))
    given = placed.subquery("placed")  # one look at the clock
    return (
        update(_TABLE)
        .where(by_key(_TABLE.c.id, given.c.id), stands_in(JobState.QUEUED), _TABLE.c.attempt == 0)
        .values(
            args=cast(given.c.args, JSONB),
            first_due_at=given.c.due,
            run_at=given.c.due,
            priority=given.c.priority,
            expires_at=func.coalesce(given.c.expires_at, given.c.due + given.c.expires_in),
        )
        .returning(*told(_TABLE))
    )


REPLACE = _replace_statement()


# ── its key is free: final, its time of uniqueness over; queued → cancelled, its deadline over ──────────────────────


def _free_statement() -> Update:
    over = (
        select(Job.id, _EXPIRED.label("expired"))
        .where(
            Job.name == bindparam("wanted_name", type_=Text),
            Job.unique_key == bindparam("wanted_key", type_=Text),
            text(f"({UNIQUE_WHILE})"),
            or_(_TIME_IS_OVER, _EXPIRED),
        )
        .with_for_update(key_share=True)
        .cte("over")
    )
    said = literal("expired: no attempt may start after ", Text) + cast(Job.expires_at, Text)
    return (
        update(Job)
        .where(by_key(Job.id, over.c.id))
        .values(
            unique_until=null(),
            state=case((over.c.expired, literal(JobState.CANCELLED.value)), else_=Job.state),
            finished_at=case((over.c.expired, _NOW), else_=Job.finished_at),
            error=case((over.c.expired, said), else_=Job.error),
        )
    )


FREE = _free_statement()
