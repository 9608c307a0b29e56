"""Running → queued, failed or cancelled: each leaves a row in `attempt`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import (
    CTE,
    Boolean,
    ColumnElement,
    Integer,
    Interval,
    Select,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    case,
    cast,
    false,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from worker.core.states import FINAL, Ending, JobState
from worker.db.models import Attempt, Job, constant, stands_in
from worker.db.statements.rows import given_rows, held_rows

_NOT_CONTENDED: ColumnElement[int] = literal(0)
# What became of a job whose worker is gone, or never knew it, nobody can tell.
_UNTOLD, _UNTOLD_INTERVAL = null(), cast(null(), Interval)


def _leave(
    held: CTE,
    *,
    state: ColumnElement[str],
    wait: ColumnElement[timedelta],
    failures: ColumnElement[int],
    crashes: ColumnElement[int],
    ending: ColumnElement[str],
    error: ColumnElement[Any],
    traceback: ColumnElement[Any],
    contended: ColumnElement[int] = _NOT_CONTENDED,
    blocked: ColumnElement[Any] = _UNTOLD_INTERVAL,
    lazy_loads: ColumnElement[Any] = _UNTOLD,
) -> Select[Any]:
    """The held rows leave `running` and each leaves an attempt; a job somebody asked to cancel is not run again."""
    to = case((and_(state == JobState.QUEUED, Job.cancel_requested), literal(JobState.CANCELLED.value)), else_=state)
    now = func.clock_timestamp()
    expired = func.coalesce(Job.expires_at < Job.started_at, false())
    moved = (
        update(Job)
        .where(Job.id == any_(func.array(select(held.c.id).scalar_subquery())))
        .values(
            state=to,
            run_at=case((to == JobState.QUEUED, now + wait), else_=Job.run_at),
            finished_at=case((to.in_(sorted(FINAL)), now)),
            failures=Job.failures + failures,
            crashes=crashes,
            contended=Job.contended + contended,
            error=func.coalesce(error, Job.error),
            unique_until=case((or_(to != JobState.CANCELLED, ~expired), Job.unique_until)),
        )
        .returning(
            Job.id,
            Job.name,
            Job.queue,
            Job.state,
            (Job.run_at - now).cast(Interval).label("wait"),
            Job.enqueued_at,
            Job.priority,
            Job.token,
            Job.attempt,
            Job.worker_id,
            Job.started_at,
            ending.label("ending"),
            error.label("error_text"),
            traceback.label("traceback"),
            blocked.label("blocked"),
            cast(lazy_loads, JSONB).label("lazy_loads"),
        )
        .cte("moved")
    )
    noted = (
        insert(Attempt)
        .from_select(
            [
                "job_id",
                "token",
                "number",
                "worker_id",
                "started_at",
                "ending",
                "error",
                "traceback",
                "blocked",
                "lazy_loads",
            ],
            select(
                moved.c.id,
                moved.c.token,
                moved.c.attempt,
                moved.c.worker_id,
                moved.c.started_at,
                moved.c.ending,
                moved.c.error_text,
                moved.c.traceback,
                moved.c.blocked,
                moved.c.lazy_loads,
            ),
            include_defaults=False,
        )
        .cte("noted")
    )
    told = moved.c
    return select(
        told.id, told.name, told.queue, told.state, told.wait, told.enqueued_at, told.ending, told.priority
    ).add_cte(noted)


_NO_WAIT = literal(timedelta(0), Interval)


def _one_held() -> CTE:
    """The job; where another transaction holds its row, an error at once, so that no connection is kept waiting."""
    return (
        select(Job.id, Job.crashes)
        .where(
            Job.id == bindparam("job_id", type_=Uuid),
            Job.token == bindparam("mine", type_=Uuid),
            stands_in(JobState.RUNNING),
        )
        .with_for_update(key_share=True, nowait=True)
        .cte("held")
    )


LEAVE_ONE = _leave(
    _one_held(),
    state=bindparam("state", type_=Text),
    wait=bindparam("wait", type_=Interval),
    failures=bindparam("failures", type_=Integer),
    crashes=Job.crashes.expression,
    contended=bindparam("contended", type_=Integer),
    ending=bindparam("ending", type_=Text),
    error=bindparam("error", type_=Text),
    traceback=bindparam("traceback", type_=Text),
    blocked=bindparam("blocked", type_=Interval),
    lazy_loads=bindparam("lazy_loads", type_=Text),
)


RELEASE_MANY = _leave(
    held_rows(given_rows(("job_id", Uuid), ("mine", Uuid))),
    state=literal(JobState.QUEUED.value, Text),
    wait=_NO_WAIT,
    failures=literal(0),
    crashes=Job.crashes.expression,
    ending=literal(Ending.RELEASED.value, Text),
    error=bindparam("reason", type_=Text),
    traceback=null(),
)


# ── running → queued, failed, cancelled: the worker stopped beating ──────────────────────────────────────────────────


def _rescue_statement() -> Select[Any]:
    locked = (
        select(Job.id, Job.crashes)
        .where(Job.worker_id == bindparam("dead", type_=Uuid), Job.state == constant(JobState.RUNNING))
        .order_by(Job.id)
        .with_for_update(key_share=True, skip_locked=True)
        .cte("locked")
    )
    blamed = ~bindparam("had_announced_its_stop", type_=Boolean)
    crashes = Job.crashes + cast(blamed, Integer)
    last = and_(blamed, crashes >= bindparam("max_crashes", type_=Integer))
    return _leave(
        locked,
        state=case((last, literal(JobState.FAILED.value)), else_=literal(JobState.QUEUED.value)),
        wait=_NO_WAIT,
        failures=literal(0),
        crashes=crashes,
        ending=case((blamed, literal(Ending.CRASHED.value)), else_=literal(Ending.RELEASED.value)),
        error=bindparam("reason", type_=Text),
        traceback=null(),
    )


RESCUE = _rescue_statement()
