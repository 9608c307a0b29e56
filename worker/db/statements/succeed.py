"""Running → succeeded: one in the attempt's own transaction, many by a flush; some leave a row in `attempt`."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Interval,
    Select,
    Text,
    Update,
    Uuid,
    bindparam,
    cast,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from worker.core.states import Ending, JobState
from worker.db.models import SCHEMA, Attempt, Job, stands_in
from worker.db.statements.hold import SILENCE_LIMIT_MS
from worker.db.statements.rows import by_key, given_rows, held_rows

SUCCEED_HERE: Final = f"{SCHEMA}.succeed"
"""The function of the first migration that does what `SUCCEED` does, or fails with a code of its own."""

_end_the_silent = func.set_config("idle_in_transaction_session_timeout", SILENCE_LIMIT_MS, true())


def _succeeding(json: ColumnElement[str], *which: ColumnElement[bool]) -> Update:
    return (
        update(Job)
        .where(*which)
        .values(state=JobState.SUCCEEDED, result=cast(json, JSONB), finished_at=func.clock_timestamp(), error=null())
    )


def _remarked(
    succeeding: Update, blocked: ColumnElement[Any], lazy_loads: ColumnElement[Any], *told: ColumnElement[Any]
) -> Select[Any]:
    """The same, and each success of which there is something to tell leaves an attempt."""
    done = succeeding.returning(
        Job.id,
        Job.token,
        Job.attempt,
        Job.worker_id,
        Job.started_at,
        Job.finished_at,
        blocked.label("blocked"),
        cast(lazy_loads, JSONB).label("lazy_loads"),
        *told,
    ).cte("done")
    of = done.c
    rows = select(
        of.id,
        of.token,
        of.attempt,
        of.worker_id,
        of.started_at,
        of.finished_at,
        literal(Ending.SUCCEEDED.value, Text),
        of.blocked,
        of.lazy_loads,
    ).where(or_(of.blocked.is_not(None), of.lazy_loads.is_not(None)))
    into = [
        "job_id",
        "token",
        "number",
        "worker_id",
        "started_at",
        "finished_at",
        "ending",
        "blocked",
        "lazy_loads",
    ]
    noted = insert(Attempt).from_select(into, rows, include_defaults=False).cte("noted")
    return select(of.id, of.token).add_cte(noted)


_one = _succeeding(
    bindparam("json", type_=Text),
    Job.id == bindparam("job_id", type_=Uuid),
    Job.token == bindparam("mine", type_=Uuid),
    stands_in(JobState.RUNNING),
)
SUCCEED = _one.returning(Job.id, _end_the_silent)
SUCCEED_REMARKED = _remarked(
    _one, bindparam("blocked", type_=Interval), bindparam("lazy_loads", type_=Text), _end_the_silent
)

_held = held_rows(given_rows(("job_id", Uuid), ("mine", Uuid), ("json", Text), numbered="number"))
# Numbers, for a busy worker takes long to make ids and tokens of them and to compare these.
SUCCEED_MANY: Any = _succeeding(_held.c.json, by_key(Job.id, _held.c.id)).returning(_held.c.number)

_told = held_rows(
    given_rows(("job_id", Uuid), ("mine", Uuid), ("json", Text), ("blocked", Interval), ("lazy_loads", Text))
)
SUCCEED_MANY_REMARKED = _remarked(
    _succeeding(_told.c.json, by_key(Job.id, _told.c.id)), _told.c.blocked, _told.c.lazy_loads
)
