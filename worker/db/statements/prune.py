"""Final → gone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import CTE, ColumnElement, Integer, Interval, Select, Text, any_, bindparam, delete, func, or_, select

from worker.core.states import FINAL
from worker.db.models import Attempt, Job, constant


def _all_of(rows: CTE) -> ColumnElement[Any]:
    return func.array(select(rows.c.id).scalar_subquery())


def _prune_statement() -> Select[Any]:
    old = (
        select(Job.id)
        .where(
            Job.state == bindparam("state", type_=Text),
            Job.state.in_([constant(state) for state in sorted(FINAL)]),
            Job.finished_at < func.statement_timestamp() - bindparam("keep", type_=Interval),
            or_(Job.unique_until.is_(None), Job.unique_until <= func.statement_timestamp()),  # its key is taken so long
        )
        .order_by(Job.finished_at)
        .limit(bindparam("batch", type_=Integer))
        .with_for_update(skip_locked=True)
        .cte("old")
    )
    jobs = delete(Job).where(Job.id == any_(_all_of(old))).returning(Job.id).cte("jobs")
    attempts = delete(Attempt).where(Attempt.job_id == any_(_all_of(jobs))).cte("attempts")
    return select(func.count()).select_from(jobs).add_cte(attempts)


PRUNE = _prune_statement()
