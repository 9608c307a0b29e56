"""Queued → cancelled, running: cancel requested."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, Text, Uuid, bindparam, case, func, literal, null, or_, select, true, update

from worker.core.states import JobState
from worker.db.models import Installation, Job, constant
from worker.db.statements.rows import WANTED_STATE, by_key, given_ids


def _request_cancel_statement() -> Select[Any]:
    """One job, as it stood when it was locked: what waits is cancelled, what runs is flagged, what is final stays."""
    return _ask(
        select(Job.id, Job.state, Job.worker_id, true().label("wanted"))
        .where(Job.id == bindparam("job_id", type_=Uuid))
        .with_for_update(key_share=True)
    )


def _request_cancel_many_statement() -> Select[Any]:
    given = given_ids(waits=False)
    return _ask(given.add_columns(Job.state, Job.worker_id, WANTED_STATE.label("wanted")))


def _ask(given: Any) -> Select[Any]:
    locked = given.cte("locked")
    waits, runs = locked.c.state == constant(JobState.QUEUED), locked.c.state == constant(JobState.RUNNING)
    asked = (
        update(Job)
        .where(by_key(Job.id, locked.c.id), locked.c.wanted, or_(waits, runs))
        .values(
            cancel_requested=True,
            state=case((waits, literal(JobState.CANCELLED.value)), else_=Job.state),
            finished_at=case((waits, func.clock_timestamp()), else_=Job.finished_at),
            error=case((waits, bindparam("reason", type_=Text)), else_=Job.error),
            unique_until=case((waits, null()), else_=Job.unique_until),
        )
        .cte("asked")
    )
    installation = select(Installation.id).scalar_subquery()
    return select(locked.c.id, locked.c.state, locked.c.worker_id, installation, locked.c.wanted).add_cte(asked)


REQUEST_CANCEL = _request_cancel_statement()
REQUEST_CANCEL_MANY = _request_cancel_many_statement()
