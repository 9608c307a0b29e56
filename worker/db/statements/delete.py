"""Final → gone, because a person says so."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, and_, any_, delete, func, select

from worker.core.states import FINAL
from worker.db.models import Attempt, Job, constant
from worker.db.statements.rows import WANTED_STATE, asked_after, given_ids


def _delete_statement() -> Select[Any]:
    final = Job.state.in_([constant(state) for state in sorted(FINAL)])
    locked = (
        given_ids(waits=False)
        .add_columns(Job.state, asked_after().label("young"), and_(final, WANTED_STATE).label("wanted"))
        .cte("locked")
    )
    goes = select(locked.c.id).where(locked.c.wanted, ~locked.c.young)
    jobs = delete(Job).where(Job.id == any_(func.array(goes.scalar_subquery()))).returning(Job.id).cte("jobs")
    attempts = (
        delete(Attempt).where(Attempt.job_id == any_(func.array(select(jobs.c.id).scalar_subquery()))).cte("attempts")
    )
    return (
        select(locked.c.id, locked.c.state, jobs.c.id.is_not(None), locked.c.young)
        .join(jobs, jobs.c.id == locked.c.id, isouter=True)
        .add_cte(attempts)
    )


DELETE_MANY = _delete_statement()
