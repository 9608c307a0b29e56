"""The rows that a statement is given, and those of them that are still held."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    Interval,
    Select,
    SQLColumnExpression,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    column,
    exists,
    false,
    func,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import array

from worker.core.states import JobState
from worker.db.models import Job, Worker, constant, stands_in


def given_rows(*names_and_types: tuple[str, Any], numbered: str | None = None) -> CTE:
    """Rows from one array for each column; `numbered` is the name of one more, which counts them from 1."""
    arrays = [bindparam(name, type_=ARRAY(type_)) for name, type_ in names_and_types]
    columns = [column(name, type_) for name, type_ in names_and_types]
    given = func.unnest(*arrays).table_valued(*columns, name="given", with_ordinality=numbered).render_derived()
    return select(given).cte("given")


def by_key(key: SQLColumnExpression[Any], given: Any) -> ColumnElement[bool]:
    """Whether a row has the given key, for a join that can only be made from the given rows, each by the key's index.

    Where statistics were taken in the middle of a large enqueue, the planner believes the table one row long. With a
    plain `=` it would then walk the whole index, and look through all given rows for each row in it.
    """
    same: ColumnElement[bool] = key == any_(array([given]))
    return same


def held_rows(given: CTE) -> CTE:
    """Those of the given jobs that run under the given token; a row that another transaction holds is passed by.

    One row that somebody holds must not keep all others waiting: who sends these looks again at what was left out.
    """
    mine = and_(by_key(Job.id, given.c.job_id), Job.token == given.c.mine, stands_in(JobState.RUNNING))
    extra = [given.c[name] for name in given.c.keys() if name not in ("job_id", "mine")]  # noqa: SIM118 — not a dict
    return (
        select(Job.id, Job.crashes, *extra)
        .join(given, mine)
        .with_for_update(key_share=True, of=Job, skip_locked=True)
        .cte("held")
    )


# ── named by a person ───────────────────────────────────────────────────────────────────────────────────────────────

WANTED_STATE: Final = or_(
    bindparam("states", type_=ARRAY(Text)).is_(None), Job.state == any_(bindparam("states", type_=ARRAY(Text)))
)
"""Whether a person who named states has named this job's."""


def given_ids(*, waits: bool) -> Select[Any]:
    """The given jobs, as they stood when they were locked; without `waits`, what another transaction holds is left."""
    ids = any_(bindparam("ids", type_=ARRAY(Uuid)))
    return select(Job.id).where(Job.id == ids).order_by(Job.id).with_for_update(key_share=True, skip_locked=not waits)


def asked_after() -> ColumnElement[bool]:
    """Whether a worker may still ask if this job has succeeded: the answer to its COMMIT may be on its way."""
    young = Job.finished_at > func.clock_timestamp() - literal_column("interval '1 minute'", Interval)
    there = exists().where(Worker.id == Job.worker_id)
    return func.coalesce(and_(Job.state == constant(JobState.SUCCEEDED), young, there), false())
