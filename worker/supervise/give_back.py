"""Give back what ran in a process that is certainly dead: nobody needs to watch it be silent for a lease."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from worker.addresses import database_url
from worker.core.states import Ending, JobState
from worker.db import reads
from worker.db.engine import processor_engine
from worker.db.send import once
from worker.db.transitions import Moved
from worker.flow.after_commit import HORIZON
from worker.flow.complete import hints_of
from worker.flow.publish import Publisher
from worker.observe.events import ProcessRescued, StepFailed, emit
from worker.settings import Settings
from worker.upkeep.rescue import rescue_from

_AGAIN: Final = 0.2
_NAME: Final = "exarq parent"


async def give_back(settings: Settings, pid: int, dead: Sequence[UUID], how: str) -> None:
    """Rescue from the ids of a dead process until nothing is left of them, at most for a lease: then others do it."""
    moved: list[Moved] = []
    reason = f"its process (pid {pid}) died with {how} while the job ran there"
    try:
        async with asyncio.timeout(settings.worker.lease.total_seconds()):
            await _rescue_all(settings, dead, reason, moved)
    except TimeoutError:
        pass  # each failure was told
    failed = sum(job.state is JobState.FAILED for job in moved)
    blamed = sum(job.ending is Ending.CRASHED for job in moved)
    emit(ProcessRescued(pid=pid, workers=tuple(dead), jobs=len(moved), failed=failed, blamed=blamed))


async def _rescue_all(settings: Settings, dead: Sequence[UUID], reason: str, moved: list[Moved]) -> None:
    """What another transaction or another rescuer holds just now is tried again."""
    engine = processor_engine(
        database_url(settings),
        application_name=lambda: _NAME,
        connections=1,
        connect_timeout=settings.database.connect_timeout,
        statement_timeout=settings.database.statement_timeout,
        pooler=settings.database.pooler,
    )
    try:
        while True:
            try:
                beats = (await once(engine, partial(reads.sweep, horizon=HORIZON, soon=timedelta(0)))).beats
                left = [worker for worker in dead if worker in beats]
                if not left:
                    return
                for worker in left:
                    moved += await _rescue(settings, engine, worker, beats[worker], reason)
            except Exception as error:
                emit(StepFailed(step="give back the jobs of a dead process", error=f"{type(error).__name__}: {error}"))
                await asyncio.sleep(_AGAIN)
    finally:
        await engine.dispose()


async def _rescue(settings: Settings, engine: AsyncEngine, worker: UUID, beat: int | None, reason: str) -> list[Moved]:
    moved = await rescue_from(engine, worker, beat, reason=reason, max_crashes=settings.jobs.max_crashes)
    if not moved:
        await asyncio.sleep(_AGAIN)
        return []
    installation = await once(engine, reads.installation_id)
    await _publish(settings, moved, installation)
    return moved


async def _publish(settings: Settings, moved: Sequence[Moved], installation: UUID) -> None:
    publisher = Publisher.from_settings(settings)
    publisher.publish(hints_of(moved, installation))
    await publisher.close()
