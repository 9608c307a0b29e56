"""Listen: a message says that somebody asked to cancel a job that runs here, or waits for one to end.

PostgreSQL says whether a cancel was asked for, and to the waiter how the job ended.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import timedelta
from typing import Final

from arq.connections import ArqRedis
from redis.exceptions import ResponseError

from worker.broker import messages
from worker.broker.connection import UNREACHABLE
from worker.broker.messages import CancelAsked, Cancelled, EndAwaited
from worker.db import reads
from worker.db.send import once
from worker.flow.availability import Availability
from worker.flow.holdings import Because, Run
from worker.flow.work import Work
from worker.observe.events import StepFailed, emit

STEP: Final = "listen"
_AFTER_A_REFUSAL: Final = timedelta(minutes=1)
# A claim whose answer is on its way, or a task that has not begun: the function can be cancelled a moment later.
_LOOK_AFTER: Final = (0.0, 0.05, 0.2, 0.5)


async def listen(work: Work, redis: ArqRedis, availability: Availability) -> timedelta | None:
    """Do what is asked for while Redis is there; what nobody hears meanwhile, the next beat or the waiter sees."""
    if availability.away:
        return None
    try:
        told = messages.told_to_workers(redis, work.installation, timeout=work.settings.redis.timeout)
        async with aclosing(told):
            async for message in told:
                match message:
                    case CancelAsked(worker_id=work.identity.id):
                        await _look(work)
                    case Cancelled(job_id):
                        work.awaited.ended(job_id)
                        work.mirror.moved(job_id)
                    case EndAwaited():
                        work.awaited.heard(message)
    except ResponseError as error:  # this user may not have the channel
        emit(StepFailed(step=STEP, error=f"{type(error).__name__}: {error}"))
        return _AFTER_A_REFUSAL
    except UNREACHABLE as error:
        await _tell_lost(redis, availability, error)
    return None


async def _look(work: Work) -> None:
    """Cancel every run whose row is flagged; look again soon while the function of one cannot be cancelled yet."""
    for pause in _LOOK_AFTER:
        await asyncio.sleep(pause)
        try:
            rows = await once(work.processor, lambda connection: reads.running_under(connection, work.identity.id))
        except Exception as error:
            emit(StepFailed(step=STEP, error=f"{type(error).__name__}: {error}"))
            return
        runs = work.holdings.runs()
        left = [held for held, asked in rows.items() if asked and not _ends(runs.get(held))]
        if not left:
            return


def _ends(run: Run | None) -> bool:
    return run is not None and (run.cancel(Because.CANCEL_REQUESTED) or run.cancelled_because is not None)


async def _tell_lost(redis: ArqRedis, availability: Availability, error: BaseException) -> None:
    """Redis is away only if it does not answer others either: a single connection may be ended for many reasons."""
    try:
        await redis.ping()
    except UNREACHABLE as away:
        availability.lost(away)
    else:
        emit(StepFailed(step=STEP, error=f"{type(error).__name__}: {error}"))
