"""Schedule: enqueue what the clock says; whichever worker comes first takes a tick, together with its job.

All workers look when the next tick is due; while none is near, a sweep looks for them. Taking a tick moves the schedule
on only from where the worker has seen it, in the transaction that enqueues, so who dies in the middle of it has taken
nothing. The clock is PostgreSQL's.
"""

from __future__ import annotations

import random
import time
from datetime import datetime, timedelta
from functools import partial
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession

from worker.core.schedule import Schedule
from worker.db import schedules
from worker.db.failures import is_away
from worker.db.schedules import Look, Scheduled
from worker.db.send import once
from worker.db.turns import CLOCK
from worker.flow.enqueue import enqueue_many
from worker.flow.schedules import call_of
from worker.flow.work import Work
from worker.observe.events import ScheduleNameTaken, StepFailed, TickCommitting, Ticked, TickFailed, emit

# The first of many workers to wake takes the tick, and the others need not try.
_SPREAD: Final = timedelta(milliseconds=200)
# Another has it just now; should that one die, the tick is due still.
_AFTER_ANOTHER: Final = timedelta(milliseconds=500)


class Ticker:
    """One worker's look at the clock: `tick` is its step.

    Args:
        work: the worker's parts; what its code declares is synchronised first.

    """

    def __init__(self, work: Work) -> None:
        self._work = work
        rules = {name: work.registry.get(name).rules for name in work.registry.names()}
        self._declared = {name: one.schedule for name, one in rules.items() if one.schedule is not None}
        self._synchronised = not self._declared

    async def synchronise(self) -> None:
        """Make the schedules that the code declares; where that fails the next look does it."""
        try:
            await self._synchronise()
        except Exception as error:
            emit(StepFailed(step=CLOCK, error=f"{type(error).__name__}: {error}"))

    async def tick(self) -> timedelta | None:
        """Take each tick that is due; returns how long to wait for the next one, None where a sweep sees it in time."""
        await self.synchronise()
        if not self._synchronised:
            return self._work.settings.worker.sweep
        again: list[datetime] = []
        seen: Look | None = None
        looked = 0.0
        while seen is None or seen.goes_on:
            looked = time.monotonic()
            seen = await self._look(seen.soon[-1] if seen else None)
            again += [await self._take(scheduled, seen.now) for scheduled in seen.soon]
        if not again:
            return None
        passed = timedelta(seconds=time.monotonic() - looked)
        return max(min(again) - seen.now - passed, timedelta(0)) + random.random() * _SPREAD  # noqa: S311 — no secret

    async def _synchronise(self) -> None:
        if not self._synchronised:
            await once(self._work.processor, lambda connection: connection.run_sync(synchronise, self._declared))
            self._synchronised = True

    async def _look(self, behind: Scheduled | None) -> Look:
        within, known = 2 * self._work.settings.worker.sweep, self._work.registry.names()
        look = partial(schedules.look, declared=list(self._declared), known=known, within=within, behind=behind)
        return await once(self._work.processor, lambda connection: connection.run_sync(look))

    async def _take(self, scheduled: Scheduled, now: datetime) -> datetime:
        """Take what is due of one schedule; returns when to look at it again."""
        if scheduled.next_at > now:
            return scheduled.next_at
        try:
            next_at = scheduled.schedule.after(now, scheduled.since)
            taken = await take(self._work, scheduled, now, next_at)
        except (
            Exception
        ) as error:  # the code has changed since, or somebody holds the key: the others tick all the same
            if is_away(error):
                raise
            emit(TickFailed(schedule=scheduled.name, error=f"{type(error).__name__}: {error}"))
            return now + self._work.settings.worker.sweep
        return next_at if taken else now + _AFTER_ANOTHER


async def take(work: Work, scheduled: Scheduled, now: datetime, next_at: datetime) -> bool:
    """Enqueue the jobs of the ticks that are due and move the schedule on, both or neither.

    Returns: whether it did; not where somebody else has, or has paused it.

    Raises: what an enqueue raises, where the job takes no such arguments any more.
    """
    definition = work.registry.get(scheduled.job)
    ticks = scheduled.schedule.due(scheduled.next_at, now, scheduled.since)
    calls = [call_of(scheduled, definition, tick=tick) for tick in ticks]
    async with AsyncSession(work.processor, info=work.publisher.info) as session, session.begin():
        connection = await session.connection()
        if not await connection.run_sync(schedules.advance, scheduled.name, due=scheduled.next_at, next_at=next_at):
            return False
        handles = await enqueue_many(session, calls)
        made = [(tick, one.id) for tick, one in zip(ticks, handles, strict=True) if one.happened == "created"]
        if made:
            await connection.run_sync(schedules.note_job, scheduled.name, *made[-1])
        emit(TickCommitting(schedule=scheduled.name))
    tick = (ticks or [scheduled.next_at])[-1].isoformat()
    emit(Ticked(schedule=scheduled.name, tick=tick, jobs=len(made), skipped=len(ticks) - len(made)))
    return True


def synchronise(connection: Connection, declared: dict[str, Schedule]) -> None:
    """Make the schedules that the code declares, and change those that it declares otherwise than they stand.

    What stands and is declared no more is left: a worker of another release, or of other modules, may declare it. It
    ticks only where a worker does.
    """
    stand = {one.name: one for one in schedules.find(connection, declared)}
    since = schedules.since_now(connection)
    for name, schedule in declared.items():
        present = stand.get(name)
        if present is None or (present.declared and present.schedule != schedule):
            schedules.declare(connection, name, schedule, since)
        elif not present.declared:
            emit(ScheduleNameTaken(schedule=name))
