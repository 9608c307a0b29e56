"""Queued → cancelled, running: cancel requested."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, Text, Uuid, bindparam, case, func, literal, or_, select, update

from worker.core.states import JobState
from worker.db.models import Installation, Job, constant


def _request_cancel_statement() -> Select[Any]:
    """One job, as it stood when it was locked: what waits is cancelled, what runs is flagged, what is final stays."""
    locked = (
        select(Job.id, Job.state, Job.worker_id)
        .where(Job.id == bindparam("job_id", type_=Uuid))
        .with_for_update(key_share=True)
        .cte("locked")
    )
    waits, runs = locked.c.state == constant(JobState.QUEUED), locked.c.state == constant(JobState.RUNNING)
    asked = (
        update(Job)
        .where(Job.id == locked.c.id, or_(waits, runs))
        .values(
            cancel_requested=True,
            state=case((waits, literal(JobState.CANCELLED.value)), else_=Job.state),
            finished_at=case((waits, func.clock_timestamp()), else_=Job.finished_at),
            error=case((waits, bindparam("reason", type_=Text)), else_=Job.error),
        )
        .cte("asked")
    )
    return select(locked.c.state, locked.c.worker_id, select(Installation.id).scalar_subquery()).add_cte(asked)


REQUEST_CANCEL = _request_cancel_statement()
