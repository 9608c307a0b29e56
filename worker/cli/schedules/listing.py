"""`exarq schedules list`: when each ticks, and whether it does."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, Final

from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncSession

from worker.cli.database import migrated_database
from worker.cli.output import Column, ago, duration, note, print_json, print_table
from worker.core.schedule import MISSED_AFTER, Schedule
from worker.db.schedules import Scheduled
from worker.flow.schedules import list_schedules
from worker.settings import load_settings

_STYLES: Final = {"paused": "yellow", "late": "bold red"}


def print_list(*, as_json: bool) -> None:
    """Print all schedules."""
    found = asyncio.run(_read())
    if as_json:
        print_json([as_plain(one) for one in found])
    elif found:
        columns = [Column("name", folds=True), Column("state"), Column("when"), Column("next"), Column("last")]
        print_table(columns, [_row(one) for one in found], last="job")
    else:
        note("there are no schedules; declare one with @job(cron=…) or @job(every=…), or `exarq schedules add` one")
    if late := [one.name for one in found if _state(one) == "late"]:
        note(f"no worker makes the ticks of {', '.join(late)}: does one run whose code declares it, or knows its job?")


async def _read() -> list[Scheduled]:
    async with migrated_database(load_settings()) as engine, AsyncSession(engine) as session:
        return await list_schedules(session)


def as_plain(one: Scheduled) -> dict[str, Any]:
    """The schedule as JSON has it; times between ticks are seconds."""
    schedule = one.schedule
    return {
        "name": one.name,
        "state": _state(one),
        "job": one.job,
        "args": one.args,
        "queue": one.queue,
        "priority": one.priority,
        "declared": one.declared,
        "cron": schedule.cron,
        "timezone": schedule.timezone if schedule.cron else None,
        "every": schedule.every.total_seconds() if schedule.every else None,
        "catch_up": schedule.catch_up,
        "overlap": schedule.overlap,
        "next_at": one.next_at,
        "paused_at": one.paused_at,
        "last_at": one.last_at,
        "last_job_id": one.last_job_id,
    }


def _row(one: Scheduled) -> list[str | Text]:
    state = _state(one)
    upcoming = "–" if state == "paused" else ago(one.next_at)
    source = "" if one.declared else " (added)"
    when = _when(one.schedule)
    return [one.name, Text(state, style=_STYLES.get(state, "")), when, upcoming, ago(one.last_at), f"{one.job}{source}"]


def _state(one: Scheduled) -> str:
    if one.paused_at is not None:
        return "paused"
    return "late" if datetime.now(UTC) - one.next_at > MISSED_AFTER else "active"


def _when(schedule: Schedule) -> str:
    return f"{schedule.cron} {schedule.timezone}" if schedule.every is None else f"every {duration(schedule.every)}"
