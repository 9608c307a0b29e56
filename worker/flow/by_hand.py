"""Many jobs that a person retries, cancels or deletes: in short transactions, each job with what came of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias
from uuid import UUID

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.core.states import FINAL, JobState
from worker.db import people, reads
from worker.db.failures import is_contention
from worker.db.people import Deletion, Wanted
from worker.db.transitions import CancelRequest
from worker.flow.cancel import message_of
from worker.flow.holdings import Because
from worker.flow.publish import Publishable, Publisher
from worker.flow.retry import came_to, hint_of

Verb: TypeAlias = Literal["retry", "cancel", "delete"]

DONE: Final = {"retry": ("retried",), "cancel": ("cancelled", "requested"), "delete": ("deleted",)}
"""What came of a job that was moved as it was wanted."""

BATCH: Final = 500


@dataclass(frozen=True, slots=True)
class CameTo:
    """What came of one job.

    Args:
        job_id: its id.
        outcome: one of `DONE`; `changed`: it is in none of the states that were named; `final`, `not final`: it cannot
            be moved so; `locked`: another transaction holds it; `key taken`, `asked after`: as of a `Retrial`;
            `unknown`: there is no such job.
        state: its state from here on, None where there is none.

    """

    job_id: UUID
    outcome: str
    state: JobState | None


async def move_many(
    engine: AsyncEngine, publisher: Publisher, verb: Verb, ids: Sequence[UUID], *, states: Wanted = None
) -> AsyncIterator[list[CameTo]]:
    """Move these a batch at a time, and tell of each batch once it is committed and its hints are sent."""
    todo = [list(ids[start : start + BATCH]) for start in range(0, len(ids), BATCH)][::-1]
    while todo:
        batch = todo.pop()
        to_publish: list[Publishable] = []
        try:
            async with engine.begin() as connection:
                done = await _move(connection, verb, batch, states, to_publish)
        except DBAPIError as error:
            if not (isinstance(error, IntegrityError) or is_contention(error)):
                raise
            if len(batch) == 1:  # while others wait for what it holds, it does not wait for them
                why = "key taken" if isinstance(error, IntegrityError) else "locked"
                yield [CameTo(batch[0], why, None)]
            else:
                half = len(batch) // 2
                todo += [batch[half:], batch[:half]]
            continue
        publisher.publish(to_publish)
        await publisher.flush()
        yield done


async def _move(
    connection: AsyncConnection, verb: Verb, ids: Sequence[UUID], states: Wanted, to_publish: list[Publishable]
) -> list[CameTo]:
    if verb == "retry":
        again = await people.retry_many(connection, ids, states=states)
        to_publish += [hint_of(one) for one in again if one.moved]
        done = [_unless_changed(CameTo(one.job_id, *came_to(one)), one.stood, states) for one in again]
    elif verb == "cancel":
        asked = await people.request_cancel_many(connection, ids, Because.CANCEL_REQUESTED, states=states)
        messages = [message_of(id_, request) for id_, request, wanted in asked if wanted]
        to_publish += [message for message in messages if message is not None]
        done = [_unless_changed(_asked(id_, request), request.stood, states) for id_, request, _ in asked]
    else:
        deletions = await people.delete_many(connection, ids, states=states)
        done = [_unless_changed(_deleted(one), one.stood, states) for one in deletions]
    return done + await _left_out(connection, {*ids} - {one.job_id for one in done})


def _unless_changed(came: CameTo, stood: JobState, states: Wanted) -> CameTo:
    changed = states is not None and stood not in states
    return CameTo(came.job_id, "changed", stood) if changed else came


def _asked(job_id: UUID, request: CancelRequest) -> CameTo:
    if request.stood is JobState.QUEUED:
        return CameTo(job_id, "cancelled", JobState.CANCELLED)
    return CameTo(job_id, "final" if request.stood in FINAL else "requested", request.stood)


def _deleted(one: Deletion) -> CameTo:
    if one.moved:
        return CameTo(one.job_id, "deleted", None)
    return CameTo(one.job_id, "asked after" if one.asked_after else "not final", one.stood)


async def _left_out(connection: AsyncConnection, ids: set[UUID]) -> list[CameTo]:
    """Those that the statement has passed by: held by another transaction, or not there."""
    if not ids:
        return []
    found = await reads.standings(connection, sorted(ids))
    return [
        CameTo(id_, "locked" if id_ in found else "unknown", found[id_].state if id_ in found else None) for id_ in ids
    ]
