"""The rows of schedules: declared by code, made and changed by people, and moved on by whoever takes a tick."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, cast
from uuid import UUID

from sqlalchemy import Connection, Row, Table, and_, case, delete, func, or_, select, true, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from worker.core.schedule import Schedule
from worker.db.models import ScheduleRow

_TABLE: Final = cast("Table", ScheduleRow.__table__)
_NOW: Final = func.clock_timestamp()
_OF_A_SCHEDULE: Final = ("cron", "timezone", "every", "catch_up", "overlap")
MOST_AT_ONCE: Final = 100


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One schedule as it stands.

    Args:
        name: what it is called.
        job: the name of the definition whose jobs it enqueues.
        args: their arguments.
        queue: their queue; None where the definition says it.
        priority: likewise.
        declared: whether code declares it; else somebody has added it.
        schedule: when it ticks.
        since: when it was made, or made to tick otherwise.
        next_at: the next tick that has had no job yet.
        paused_at: since when it does not tick; None where it does.
        last_at: the last tick that had a job; None before the first.
        last_job_id: that job.

    """

    name: str
    job: str
    args: dict[str, Any]
    queue: str | None
    priority: int | None
    declared: bool
    schedule: Schedule
    since: datetime
    next_at: datetime
    paused_at: datetime | None = None
    last_at: datetime | None = None
    last_job_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """The schedules that tick soon, in order, `MOST_AT_ONCE` at the most, and what time it is."""

    now: datetime
    soon: list[Scheduled]

    @property
    def goes_on(self) -> bool:
        """Whether behind these there may be more that are due."""
        return len(self.soon) == MOST_AT_ONCE and self.soon[-1].next_at <= self.now


def now(connection: Connection) -> datetime:
    """What time it is."""
    found: datetime = connection.execute(select(_NOW)).scalar_one()
    return found


def since_now(connection: Connection) -> datetime:
    """What time it is, in whole seconds: a schedule that is made now ticks at such."""
    return now(connection).replace(microsecond=0)


def find(connection: Connection, names: Collection[str] | None = None, *, lock: bool = False) -> list[Scheduled]:
    """These schedules by name, or all; with `lock` nobody moves them before the transaction ends."""
    query = select(_TABLE).order_by(ScheduleRow.name)
    if names is not None:
        query = query.where(ScheduleRow.name.in_(names))
    if lock:
        query = query.with_for_update(key_share=True)
    return [_read(row) for row in connection.execute(query)]


def look(
    connection: Connection,
    *,
    declared: Collection[str],
    known: Collection[str],
    within: timedelta,
    behind: Scheduled | None = None,
) -> Look:
    """What ticks within this time, of those that this worker's code declares, and of those added for jobs it knows.

    Args:
        connection: where to look.
        declared: the names of the schedules that the code declares.
        known: the names of the jobs that it knows.
        within: how far to look.
        behind: the last one of the page before.

    """
    ours = or_(
        and_(ScheduleRow.declared, ScheduleRow.name.in_(declared)),
        and_(~ScheduleRow.declared, ScheduleRow.job.in_(known)),
    )
    until = func.statement_timestamp() + within  # by the index, as clock_timestamp() could not
    place = tuple_(ScheduleRow.next_at, ScheduleRow.name)
    soon = (
        select(_TABLE)
        .where(ScheduleRow.paused_at.is_(None), ScheduleRow.next_at <= until, ours)
        .where(place > tuple_(behind.next_at, behind.name) if behind else true())
        .order_by(ScheduleRow.next_at, ScheduleRow.name)
        .limit(MOST_AT_ONCE)
        .subquery()
    )
    clock = select(_NOW.label("now")).subquery()
    both = clock.outerjoin(soon, true())
    found = connection.execute(select(clock.c.now, soon).select_from(both).order_by(soon.c.next_at, soon.c.name)).all()
    return Look(found[0].now, [_read(row) for row in found if row.name is not None])


def declare(connection: Connection, name: str, schedule: Schedule, since: datetime) -> None:
    """Make the schedule of a job as its code says, or have it tick otherwise from now on; a pause stays a pause."""
    said = {key: getattr(schedule, key) for key in _OF_A_SCHEDULE}
    values = {**said, "since": since, "next_at": schedule.after(since, since)}
    new = insert(_TABLE).values(name=name, job=name, declared=True, **values)
    rhythm = ("cron", "timezone", "every")
    same = and_(*(_TABLE.c[key].is_not_distinct_from(new.excluded[key]) for key in rhythm))
    changed = {key: new.excluded[key] for key in said} | {
        key: case((same, _TABLE.c[key]), else_=new.excluded[key]) for key in ("since", "next_at")
    }
    connection.execute(new.on_conflict_do_update(index_elements=["name"], set_=changed, where=_TABLE.c.declared))


def add(connection: Connection, scheduled: Scheduled) -> bool:
    """Make a schedule that no code declares; False where its name is taken."""
    values: dict[str, Any] = {
        key: getattr(scheduled, key)
        for key in ("name", "job", "args", "queue", "priority", "declared", "since", "next_at")
    }
    values |= {key: getattr(scheduled.schedule, key) for key in _OF_A_SCHEDULE}
    made = insert(_TABLE).values(values).on_conflict_do_nothing().returning(ScheduleRow.name)
    return connection.execute(made).first() is not None


def advance(connection: Connection, name: str, *, due: datetime, next_at: datetime) -> bool:
    """Take the tick that is due: only if nobody has taken or is just taking it, and nobody has paused the schedule."""
    still = (
        select(ScheduleRow.name)
        .where(ScheduleRow.name == name, ScheduleRow.next_at == due, ScheduleRow.paused_at.is_(None))
        .with_for_update(key_share=True, skip_locked=True)
    )
    taken = update(_TABLE).where(ScheduleRow.name.in_(still)).values(next_at=next_at).returning(ScheduleRow.name)
    return connection.execute(taken).first() is not None


def note_job(connection: Connection, name: str, tick: datetime, job_id: UUID) -> None:
    """Keep which job the last tick has had."""
    connection.execute(update(_TABLE).where(ScheduleRow.name == name).values(last_at=tick, last_job_id=job_id))


def pause(connection: Connection, names: Collection[str]) -> None:
    """From now on these do not tick."""
    paused = update(_TABLE).where(ScheduleRow.name.in_(names), ScheduleRow.paused_at.is_(None)).values(paused_at=_NOW)
    connection.execute(paused)


def resume(connection: Connection, next_at: Mapping[str, datetime]) -> None:
    """From now on these tick again, each from this tick on."""
    for name, tick in next_at.items():
        connection.execute(update(_TABLE).where(ScheduleRow.name == name).values(paused_at=None, next_at=tick))


def remove(connection: Connection, names: Collection[str]) -> None:
    """These are no more."""
    connection.execute(delete(_TABLE).where(ScheduleRow.name.in_(names)))


def _read(row: Row[Any]) -> Scheduled:
    values = dict(row._mapping)
    values.pop("now", None)
    schedule = Schedule(**{key: values.pop(key) for key in _OF_A_SCHEDULE})
    return Scheduled(schedule=schedule, **values)
