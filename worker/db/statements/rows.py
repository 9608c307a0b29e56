"""The rows that a statement is given, and those of them that are still held."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ARRAY, CTE, and_, bindparam, column, func, select

from worker.core.states import JobState
from worker.db.models import Job, constant


def given_rows(*names_and_types: tuple[str, Any]) -> CTE:
    """Rows from one array for each column."""
    arrays = [bindparam(name, type_=ARRAY(type_)) for name, type_ in names_and_types]
    columns = [column(name, type_) for name, type_ in names_and_types]
    given = func.unnest(*arrays).table_valued(*columns, name="given").render_derived()
    return select(given).cte("given")


def held_rows(given: CTE) -> CTE:
    """Those of the given jobs that run under the given token; a row that another transaction holds is passed by.

    One row that somebody holds must not keep all others waiting: who sends these looks again at what was left out.
    """
    mine = and_(Job.id == given.c.job_id, Job.token == given.c.mine, Job.state == constant(JobState.RUNNING))
    extra = [given.c[name] for name in given.c.keys() if name not in ("job_id", "mine")]  # noqa: SIM118 — not a dict
    return (
        select(Job.id, Job.crashes, *extra)
        .join(given, mine)
        .with_for_update(key_share=True, of=Job, skip_locked=True)
        .cte("held")
    )
