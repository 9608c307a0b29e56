"""Prune: delete old finished jobs."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from worker.core.states import JobState
from worker.db import transitions, turns
from worker.flow.work import Work
from worker.observe.events import Pruned, emit

STEP: Final = "prune"
_BATCH: Final = 1_000
_REST: Final = timedelta(minutes=5)


async def prune(work: Work) -> timedelta | None:
    """Delete one batch of each final state; returns at once again while there is more, None: as usual."""
    keep = work.settings.keep
    async with work.processor.begin() as connection:
        turn = await turns.take(connection, STEP)
        if turn is None:
            return None
        pruned = [
            await transitions.prune(connection, state, keep=age, batch=_BATCH)
            for state, age in (
                (JobState.SUCCEEDED, keep.succeeded),
                (JobState.CANCELLED, keep.cancelled),
                (JobState.FAILED, keep.failed),
            )
        ]
        more = max(pruned) == _BATCH
        await turns.end(connection, turn, rest=timedelta(0) if more else _REST)
    if sum(pruned):
        emit(Pruned(jobs=sum(pruned)))
    return timedelta(0) if more else None
