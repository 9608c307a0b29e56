"""Reconcile: walk the waiting jobs and publish those that Redis does not know.

It heals every lost hint, wipe, eviction, old snapshot, late commit and drop race within a round, and it is also what
brings scheduled jobs and retries into Redis.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from arq.connections import ArqRedis

from worker.broker import scripts
from worker.broker.connection import UNREACHABLE
from worker.broker.hints import Hint, due_at, ms_of
from worker.core.pace import rest_for
from worker.db import reads, turns
from worker.db.turns import Position
from worker.flow.after_commit import HORIZON
from worker.flow.availability import Availability
from worker.flow.work import Work
from worker.observe.events import ReconcileCommitting, Reconciled, emit

STEP: Final = turns.WALK
_PAGE: Final = 1_000
_JUST_NOW: Final = timedelta(seconds=2)
_AT_ONCE: Final = timedelta(0)
_AFTER_A_ROUND: Final = timedelta(seconds=1)

# A page takes long where the loop or a server is busy, and there the jobs go first.
_REST_FOR_TIME: Final = 30
_SHORTEST_REST: Final = timedelta(milliseconds=300)
_LONGEST_REST: Final = timedelta(milliseconds=500)


async def reconcile(work: Work, redis: ArqRedis, availability: Availability) -> timedelta | None:
    """Look at one page of waiting jobs and publish what is astray; returns how long to rest, None: as usual."""
    if availability.away:
        return None
    async with work.processor.begin() as connection:
        turn = await turns.take(connection, STEP)
        if turn is None:
            return None
        began = time.monotonic()
        page = await reads.waiting(connection, after=turn.after, horizon=HORIZON, limit=_PAGE)
        read = timedelta(seconds=time.monotonic() - began)
        full = len(page) == _PAGE
        # The walk goes through a backlog in the order it is due; what comes due just now must not wait for its turn.
        soon = await reads.coming_due(connection, _JUST_NOW, limit=_PAGE) if full else []
        try:
            published = await _publish_astray(work, redis, page)
            published_early = await _publish_astray(work, redis, soon)
        except UNREACHABLE as error:
            availability.lost(error)
            return None
        took = timedelta(seconds=time.monotonic() - began)
        rest = rest_after_a_page(took, clean=not published) if full else rest_after_a_round(read)
        emit(ReconcileCommitting(hints=published + published_early))
        await turns.end(connection, turn, rest=rest, after=Position(page[-1].run_at, page[-1].id) if full else None)
    if published + published_early:
        emit(Reconciled(hints=published + published_early))
    # Behind a pooler nobody hears of what is enqueued by SQL: who had this turn takes the next, too.
    return rest if full or work.settings.database.pooler else None


def rest_after_a_round(read: timedelta) -> timedelta:
    """How long to rest after a walk whose last page took so long to read, as under an old snapshot.

    Far shorter than the horizon, for nobody else brings what is due behind it.
    """
    return max(_AFTER_A_ROUND, rest_for(read, longest=HORIZON / 3))


def rest_after_a_page(took: timedelta, *, clean: bool) -> timedelta:
    """How long to rest after a page that took so long."""
    return min(max(took * _REST_FOR_TIME, _SHORTEST_REST), _LONGEST_REST) if clean else _AT_ONCE


async def _publish_astray(work: Work, redis: ArqRedis, page: list[reads.Waiting]) -> int:
    if not page:
        return 0
    hints = hints_of(work, page)
    return await scripts.publish(redis, hints, lease=work.settings.worker.lease, only_astray=True)


def hints_of(work: Work, jobs: Iterable[reads.Waiting]) -> list[Hint]:
    """What Redis is to know of these jobs."""
    return [
        Hint(job.id, job.name, job.queue, due_at(job.due_in), ms_of(job.enqueued_at), work.installation, job.priority)
        for job in jobs
    ]
