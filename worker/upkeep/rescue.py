"""Rescue: give back the jobs of a worker that stopped beating.

It looks in the heartbeat's thread: a fleet whose loops are all blocked by their jobs must still notice a death.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.core.pace import Pace
from worker.core.states import Ending, JobState
from worker.core.watch import Watch
from worker.db import reads, transitions, workers
from worker.db.send import once
from worker.db.transitions import Moved
from worker.flow.after_commit import HORIZON
from worker.flow.work import Identity
from worker.observe.events import RescueCommitting, StepFailed, WorkerRescued, emit


async def rescue_from(
    engine: AsyncEngine, dead: UUID, beat: int | None, *, reason: str, max_crashes: int
) -> list[Moved] | None:
    """Give back the jobs of a dead worker in one transaction; None where another was faster, or it has beaten since.

    Args:
        engine: where to do it.
        dead: the worker's id.
        beat: the one that was seen; None when it has no row.
        reason: what the attempts that ended there will say.
        max_crashes: after how many crashes a job is failed.

    """
    async with engine.begin() as connection:
        if not await workers.lock_for_rescue(connection, dead):
            return None
        silent, had_announced = await workers.still_silent(connection, dead, beat)
        if not silent or (beat is None and not await reads.running_under(connection, dead)):
            return None
        await workers.end_backends(connection, Identity(dead).application_name)
        moved = await transitions.rescue(
            connection,
            dead,
            had_announced_its_stop=had_announced,
            max_crashes=max_crashes,
            reason=reason,
        )
        await workers.unregister(connection, dead)
        emit(RescueCommitting(worker=dead, jobs=len(moved)))
    return moved


class Rescuer:
    """Watches the beats of all other workers.

    Args:
        identity: which worker this process is; it never convicts itself.
        watch: who stopped beating, by this process' own clock.
        lease: how long a worker may be silent.
        sweep: the time between two looks; the next one comes earlier where a lease ends before it.
        max_crashes: after how many crashes a job is failed.
        moved: told of the jobs that were given back, in the thread that looked.
        due: told of the steps of upkeep that are due, with each look, in the same thread.

    """

    def __init__(
        self,
        identity: Identity,
        watch: Watch,
        *,
        lease: timedelta,
        sweep: timedelta,
        max_crashes: int,
        moved: Callable[[list[Moved]], None],
        due: Callable[[frozenset[str]], None] = lambda _: None,
    ) -> None:
        self._identity = identity
        self._watch = watch
        self._sweep = sweep
        self._max_crashes = max_crashes
        self._moved = moved
        self._due = due
        self._looks = Pace(lease)
        self._orphans: dict[UUID, int | None] = {}

    async def look(self, engine: AsyncEngine) -> timedelta:
        """Look once, call for the steps that are due, rescue from those that are dead; returns how long to the next."""
        seen = await self._look(engine)
        self._due(seen.due)
        beats = {**self._orphans, **seen.beats}
        beats.pop(self._identity.id, None)
        for worker_id, beat in self._watch.look(beats, time.monotonic()).items():
            try:
                await self._rescue(engine, worker_id, beat)
            except Exception as error:  # one that cannot be rescued now must not keep the others from it
                emit(StepFailed(step=f"rescue {worker_id}", error=f"{type(error).__name__}: {error}"))
        return min(self._sweep, self._watch.next_conviction(time.monotonic()) or self._sweep)

    async def _look(self, engine: AsyncEngine) -> reads.Seen:
        if not self._looks.due:
            return await once(engine, partial(self._sweep_once, looks=False))
        began = self._looks.now()
        try:
            seen = await once(engine, partial(self._sweep_once, looks=True))
        except Exception:
            # Raises, too, where it was not the look's fault.
            seen = await once(engine, partial(self._sweep_once, looks=False))
            self._looks.rest(began)
            return seen
        self._orphans = dict.fromkeys(worker_id for worker_id, beat in seen.beats.items() if beat is None)
        return seen

    async def _sweep_once(self, connection: AsyncConnection, *, looks: bool) -> reads.Seen:
        began = self._looks.now()
        seen = await reads.sweep(connection, horizon=HORIZON, soon=2 * self._sweep, looks=looks)
        if looks:
            self._looks.rest(began)
        return seen

    async def _rescue(self, engine: AsyncEngine, dead: UUID, beat: int | None) -> None:
        reason = f"worker {dead} stopped beating while the job ran there"
        moved = await rescue_from(engine, dead, beat, reason=reason, max_crashes=self._max_crashes)
        if moved is None:
            return
        self._orphans.pop(dead, None)
        failed = sum(job.state is JobState.FAILED for job in moved)
        blamed = sum(job.ending is Ending.CRASHED for job in moved)
        emit(WorkerRescued(worker=dead, jobs=len(moved), failed=failed, blamed=blamed))
        self._moved(moved)
