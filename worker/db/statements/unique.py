"""The jobs that have a key: found, replaced until they start, freed of a time that is over."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ARRAY,
    Boolean,
    Text,
    Update,
    Uuid,
    any_,
    bindparam,
    cast,
    func,
    null,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from worker.core.states import FINAL, JobState
from worker.db.models import UNIQUE_WHILE, Job, constant
from worker.db.statements.enqueue import PLACED, given_calls, told

_TABLE: Any = Job.__table__


def _find_statement() -> Any:
    """The jobs that have these keys; those that are to be replaced and can be are held as they are now."""
    given = given_calls({"wanted_name": Text, "wanted_key": Text, "to_replace": Boolean})
    over = (Job.unique_until <= func.clock_timestamp()) & Job.state.in_([constant(state) for state in sorted(FINAL)])
    replaceable = given.c.to_replace & (Job.state == constant(JobState.QUEUED)) & (Job.attempt == 0)
    having = (
        select(
            Job.name,
            Job.unique_key,
            Job.state,
            Job.queue,
            Job.priority,
            replaceable.label("replaceable"),
            func.coalesce(over, False).label("over"),
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
    given = given_calls({"id": Uuid, "args": Text, **PLACED})
    due = func.coalesce(given.c.at, func.clock_timestamp() + given.c.delay)
    return (
        update(_TABLE)
        .where(_TABLE.c.id == given.c.id, _TABLE.c.state == constant(JobState.QUEUED), _TABLE.c.attempt == 0)
        .values(
            args=cast(given.c.args, JSONB),
            first_due_at=due,
            run_at=due,
            priority=given.c.priority,
            expires_at=func.coalesce(given.c.expires_at, due + given.c.expires_in),
        )
        .returning(*told(_TABLE))
    )


REPLACE = _replace_statement()


# ── final: its time of uniqueness is over ───────────────────────────────────────────────────────────────────────────


def _free_statement() -> Update:
    over = (
        select(Job.id)
        .where(Job.id == any_(bindparam("ids", type_=ARRAY(Uuid))), Job.unique_until <= func.clock_timestamp())
        .order_by(Job.id)
        .with_for_update(key_share=True)
        .cte("over")
    )
    return update(Job).where(Job.id == over.c.id).values(unique_until=null())


FREE = _free_statement()
