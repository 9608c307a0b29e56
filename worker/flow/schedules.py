"""Schedules as people and programs make, look at and change them, in their own transaction."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from worker.core.errors import ArgumentsInvalid, ScheduleRefused, UnknownSchedule
from worker.core.names import LONGEST_NAME, is_name
from worker.core.registry import Definition, default_registry
from worker.core.schedule import CatchUp, Overlap, Schedule
from worker.db import schedules
from worker.db.failures import schema_needed
from worker.db.models import Job
from worker.db.schedules import Scheduled
from worker.flow.call import Call, EnqueueOptions, template
from worker.flow.enqueue import enqueue_one
from worker.flow.handle import Handle
from worker.flow.in_session import for_both


def call_of(scheduled: Scheduled, definition: Definition[Any, ..., Any], *, tick: datetime | None = None) -> Call:
    """The job that a tick enqueues, due at the tick, or the one that somebody wants at once.

    Raises: `ArgumentsInvalid`, `NotStorable` where the definition takes no such arguments any more.
    """
    options: EnqueueOptions = {"queue": scheduled.queue, "priority": scheduled.priority, "run_at": tick}
    if scheduled.schedule.overlap == "skip":  # whoever has the key waits or runs
        options["key"] = f"schedule {scheduled.name}"
    signature = definition.signature
    return template(definition.name, definition.rules, options).of(signature, signature.bind_mapping(scheduled.args))


@for_both
def add_schedule(
    session: Session,
    job: str | Definition[Any, ..., Any],
    args: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    cron: str | None = None,
    timezone: str | None = None,
    every: float | timedelta | None = None,
    catch_up: CatchUp | None = None,
    overlap: Overlap | None = None,
    queue: str | None = None,
    priority: int | None = None,
) -> Scheduled:
    """Have jobs enqueued by the clock, from the commit of the session's transaction on, until it is removed.

    Args:
        session: the caller's session; with a sync one, nothing is awaited.
        job: the definition, or its name; this process knows it.
        args: the arguments of each job, by name.
        name: what the schedule is called; without one, as the job.
        cron: five fields, by the clocks of `timezone`; or else `every`.
        timezone: a name such as Europe/Berlin; without one, UTC.
        every: seconds, or a timedelta, between two ticks, at least one second.
        catch_up: what ticks get that no worker made before the next one came: "last" (the default) the last of them a
            job, "skip" that one only if it is not a minute old, "all" each one, but a thousand at the most.
        overlap: "skip": no job while the one of an earlier tick waits or runs; "allow" is the default.
        queue: another queue than the definition's.
        priority: another priority.

    Raises:
        UnknownJob: no such job is registered in this process.
        ArgumentsInvalid: there is no such zone, the expression is none, or the job takes no such arguments.
        NotStorable: the arguments cannot be kept as JSON.
        ScheduleRefused: another schedule has the name.
        SchemaNotMigrated: the database has no tables of Exarq.

    """
    definition = default_registry.get(job) if isinstance(job, str) else job
    name = definition.name if name is None else name
    if not is_name(name):
        raise ArgumentsInvalid(f"a schedule's name is 1 to {LONGEST_NAME} printable characters")
    try:
        schedule = Schedule.of(cron=cron, timezone=timezone, every=every, catch_up=catch_up, overlap=overlap)
    except (TypeError, ValueError) as error:
        raise ArgumentsInvalid(f"{name}: {error}") from None
    if schedule is None:
        raise ArgumentsInvalid(f"{name}: say when: by cron, such as '0 3 * * *', or by every, such as 300 seconds")
    connection = session.connection(bind_arguments={"mapper": Job})
    with schema_needed():
        since = schedules.since_now(connection)
        given = dict(args or {})
        scheduled = Scheduled(
            name, definition.name, given, queue, priority, False, schedule, since, schedule.after(since, since)
        )
        call_of(scheduled, definition)
        if not schedules.add(connection, scheduled):
            raise ScheduleRefused(f"there is a schedule named {name!r}; remove that one, or give this one another name")
    return scheduled


@for_both
def list_schedules(session: Session) -> list[Scheduled]:
    """All schedules, by name.

    Args:
        session: the caller's session; with a sync one, nothing is awaited.

    Raises:
        SchemaNotMigrated: the database has no tables of Exarq.

    """
    with schema_needed():
        return schedules.find(session.connection(bind_arguments={"mapper": Job}))


@for_both
def pause_schedule(session: Session, name: str) -> Scheduled:
    """Have a schedule not tick until it is resumed, from the commit on; a new release of the code changes nothing.

    Args:
        session: the caller's session; with a sync one, nothing is awaited.
        name: the schedule's name.

    Raises:
        UnknownSchedule: there is none of this name.
        SchemaNotMigrated: the database has no tables of Exarq.

    """
    _named(session, name)
    schedules.pause(session.connection(bind_arguments={"mapper": Job}), [name])
    return _named(session, name)


@for_both
def resume_schedule(session: Session, name: str) -> Scheduled:
    """Have a schedule tick again, from the next tick after now on; those of the pause were not missed.

    Args:
        session: the caller's session; with a sync one, nothing is awaited.
        name: the schedule's name.

    Raises:
        UnknownSchedule: there is none of this name.
        SchemaNotMigrated: the database has no tables of Exarq.

    """
    found = _named(session, name)
    if found.paused_at is not None:
        connection = session.connection(bind_arguments={"mapper": Job})
        schedules.resume(connection, {name: found.schedule.after(schedules.now(connection), found.since)})
    return _named(session, name)


@for_both
def run_schedule(session: Session, name: str) -> Handle[Any]:
    """Enqueue a schedule's job at once, also of a paused one; its ticks come as they would.

    Args:
        session: the caller's session, in whose transaction the job is written; with a sync one, nothing is awaited.
        name: the schedule's name.

    Returns:
        The job's handle; with `overlap="skip"` that of an earlier tick's job which has not ended (its `happened` is
        "exists").

    Raises:
        UnknownSchedule: there is none of this name.
        UnknownJob: its job is not registered in this process.
        ArgumentsInvalid: its job takes no such arguments any more.
        SchemaNotMigrated: the database has no tables of Exarq.

    """
    found = _named(session, name)
    handle: Handle[Any] = enqueue_one(session, call_of(found, default_registry.get(found.job)))
    return handle


@for_both
def remove_schedule(session: Session, name: str) -> Scheduled:
    """Delete a schedule; the jobs it has enqueued stay.

    Args:
        session: the caller's session; with a sync one, nothing is awaited.
        name: the schedule's name.

    Raises:
        UnknownSchedule: there is none of this name.
        ScheduleRefused: the code of this process declares it, and the next worker's start would bring it back.
        SchemaNotMigrated: the database has no tables of Exarq.

    """
    found = _named(session, name)
    if found.declared and found.job in default_registry and default_registry.get(found.job).rules.schedule is not None:
        raise ScheduleRefused(f"@job declares the schedule {name!r}; take cron or every out there, or pause it")
    schedules.remove(session.connection(bind_arguments={"mapper": Job}), [name])
    return found


def _named(session: Session, name: str) -> Scheduled:
    """The schedule, which nobody else moves before the transaction ends."""
    connection = session.connection(bind_arguments={"mapper": Job})
    with schema_needed():
        found = schedules.find(connection, [name], lock=True)
        if not found:
            raise UnknownSchedule(name, [one.name for one in schedules.find(connection)])
    return found[0]
