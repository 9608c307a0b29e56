"""Every move twice: what the model says of it, and the statement that is sent to PostgreSQL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.db.machine import keyed, model
from tests.db.machine import people as of_people
from tests.db.machine.keyed import Asked
from tests.db.machine.model import MAX_CRASHES, Effect, Leave, View
from worker.core.errors import AlreadyEnqueued
from worker.core.outcome import ErrorText
from worker.core.states import FINAL, Ending, JobState
from worker.db import people, reads, transitions, workers
from worker.db.people import Again
from worker.db.statements.enqueue import ENQUEUE
from worker.db.transitions import ClaimedJob, Held, Moved
from worker.flow import unique
from worker.flow.after_commit import Outbox
from worker.flow.call import Call, Unique
from worker.flow.handle import Origin

ERROR = ErrorText("ValueError", "no such word", "Traceback: line 1")
SAID = f"{ERROR.type}: {ERROR.message}"
REASON = "stopped"
NOT_WANTED = "not wanted"
SILENT = "stopped beating"
ASKED = "somebody asked"


@dataclass(frozen=True)
class Move:
    """One move.

    Args:
        name: its verb.
        expected: what the model says.
        send: what PostgreSQL is asked; its answer is in the model's words.
        held: what it does about rows that another transaction holds.
        in_transaction: whether it is several statements, which belong into one transaction.
        looks_again: whether it sees all jobs as they are once it has waited, and not only those it has waited for.

    """

    name: str
    expected: Callable[[View], Effect]
    send: Callable[[AsyncConnection], Awaitable[Any]]
    held: Literal["waits", "passes by", "fails"] = "waits"
    in_transaction: bool = False
    looks_again: bool = False


def hours(count: int) -> timedelta:
    """The model's unit as PostgreSQL knows it."""
    return timedelta(hours=count)


def _in_hours(duration: timedelta) -> int:
    return round(duration / timedelta(hours=1))


def _left(moved: Collection[Moved | None]) -> set[Any]:
    return {
        (job.job_id, job.state, job.ending, _in_hours(job.wait) if job.state is JobState.QUEUED else None)
        for job in moved
        if job is not None
    }


def _claimed(jobs: Collection[ClaimedJob]) -> set[Any]:
    return {(job.held.job_id, job.attempt, job.failures, job.crashes, job.expired_at is not None) for job in jobs}


def enqueue(job_id: UUID, queue: str, wait: int) -> Move:
    async def send(connection: AsyncConnection) -> None:
        row = {"ids": job_id, "names": "tests.noop", "queues": queue, "argss": "{}", "delays": hours(wait), "ats": None}
        await connection.execute(ENQUEUE, {name: [value] for name, value in row.items()})

    return Move("enqueue", partial(model.enqueue, job_id=job_id, queue=queue, hours=wait), send)


def enqueue_in_full(asked: Sequence[Asked], ids: list[UUID]) -> Move:
    """The ids of those that are written are drawn meanwhile: `ids` has them afterwards."""

    async def send(connection: AsyncConnection) -> Any:
        try:
            origin = Origin(connection.engine.sync_engine, Outbox())
            handles, _ = await connection.run_sync(unique.insert, [_call(one) for one in asked], origin)
        except AlreadyEnqueued as refused:
            return ("taken", refused.job_id, refused.state)
        ids[:] = [handle.id for handle in handles]
        return [(handle.happened, handle.id) for handle in handles]

    expected = partial(keyed.enqueue, asked=asked, ids=ids)
    return Move("enqueue in full", expected, send, in_transaction=True, looks_again=True)


def _call(one: Asked) -> Call:
    lasts = None if one.lasts is None else hours(one.lasts)
    return Call(
        "tests.noop",
        json.dumps({"says": one.says}),
        one.queue,
        hours(one.wait),
        priority=one.priority,
        expires=None if one.expires is None else hours(one.expires),
        unique=None if one.key is None else Unique(one.key, one.scope, lasts, one.on_conflict),
    )


def claim(ids: Collection[UUID], token: UUID, worker: UUID, *, may_take_suspect: bool) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        taken = await transitions.claim(
            connection, list(ids), token=token, worker_id=worker, may_take_suspect=may_take_suspect
        )
        assert all(job.held.token == token for job in taken)
        return _claimed(taken)

    expected = partial(model.claim, ids=ids, token=token, worker=worker, may_take_suspect=may_take_suspect)
    return Move("claim", expected, send, held="passes by")


def scan(queues: Collection[str], room: int, token: UUID, worker: UUID, *, may_take_suspect: bool) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        return _claimed(
            await transitions.claim_by_scan(
                connection, list(queues), room=room, token=token, worker_id=worker, may_take_suspect=may_take_suspect
            )
        )

    expected = partial(
        model.scan, queues=queues, room=room, token=token, worker=worker, may_take_suspect=may_take_suspect
    )
    return Move("claim by scan", expected, send, held="passes by")


def succeed(held: Held, _wait: int) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        done = await connection.run_sync(transitions.succeed, held, '{"a": 1}')
        return {held.job_id} if done else set()

    return Move("succeed", partial(model.succeed, held=[held], result={"a": 1}), send)


def succeed_many(held: Collection[Held]) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        return {one.job_id for one in await transitions.succeed_many(connection, dict.fromkeys(held, "7"))}

    expected = partial(model.succeed, held=held, result=7, passes_by=True)
    return Move("succeed many", expected, send, held="passes by")


def retry(held: Held, wait: int) -> Move:
    return _retry(held, wait, counts=True)


def retry_uncounted(held: Held, wait: int) -> Move:
    return _retry(held, wait, counts=False)


def _retry(held: Held, wait: int, *, counts: bool) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        return _left([await transitions.retry(connection, held, ERROR, wait=hours(wait), counts=counts)])

    how = Leave(JobState.QUEUED, Ending.RETRIED, wait, failures=counts, error=SAID, traceback=ERROR.traceback)
    return Move(
        "retry" if counts else "retry, uncounted", partial(model.leave, held=[held], how=how), send, held="fails"
    )


def fail(held: Held, _wait: int) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        return _left([await transitions.fail(connection, held, ERROR)])

    how = Leave(JobState.FAILED, Ending.FAILED, failures=1, error=SAID, traceback=ERROR.traceback)
    return Move("fail", partial(model.leave, held=[held], how=how), send, held="fails")


def cancel(held: Held, _wait: int) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        return _left([await transitions.cancel(connection, held, NOT_WANTED)])

    how = Leave(JobState.CANCELLED, Ending.CANCELLED, error=NOT_WANTED)
    return Move("cancel", partial(model.leave, held=[held], how=how), send, held="fails")


def snooze(held: Held, wait: int) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        return _left([await transitions.snooze(connection, held, hours(wait))])

    how = Leave(JobState.QUEUED, Ending.SNOOZED, wait)
    return Move("snooze", partial(model.leave, held=[held], how=how), send, held="fails")


def release(held: Held, wait: int) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        return _left([await transitions.release(connection, held, REASON, wait=hours(wait))])

    how = Leave(JobState.QUEUED, Ending.RELEASED, wait, error=REASON)
    return Move("release", partial(model.leave, held=[held], how=how), send, held="fails")


OF_ONE = [succeed, retry, retry_uncounted, fail, cancel, snooze, release]


def release_many(held: Collection[Held]) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        return _left(await transitions.release_many(connection, list(held), REASON))

    how = Leave(JobState.QUEUED, Ending.RELEASED, error=REASON)
    expected = partial(model.leave, held=held, how=how, passes_by=True)
    return Move("release many", expected, send, held="passes by")


def rescue(dead: UUID) -> Move:
    """As the upkeep does it: one rescuer at a time, and only where the beat is still the one that was seen."""

    async def send(connection: AsyncConnection) -> Any:
        seen = (await reads.sweep(connection, horizon=timedelta(0), soon=timedelta(0))).beats.get(dead)
        if not await workers.lock_for_rescue(connection, dead):
            return None
        silent, announced = await workers.still_silent(connection, dead, seen)
        assert silent
        moved = await transitions.rescue(
            connection, dead, had_announced_its_stop=announced, max_crashes=MAX_CRASHES, reason=SILENT
        )
        await workers.unregister(connection, dead)
        return _left(moved)

    expected = partial(model.rescue, dead=dead, reason=SILENT)
    return Move("rescue", expected, send, held="passes by", in_transaction=True)


def request_cancel(job_id: UUID) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        found = await connection.run_sync(transitions.request_cancel, job_id, ASKED)
        return None if found is None else (found.stood, found.worker_id)

    return Move("request cancel", partial(of_people.request_cancel, job_id=job_id, reason=ASKED), send)


def _told(found: Collection[Again]) -> set[Any]:
    return {(one.job_id, one.stood, one.moved, one.key_is_taken) for one in found}


def retry_by_hand(job_id: UUID) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        found = await connection.run_sync(people.retry, job_id)
        return None if found is None else _told([found])

    return Move("retry by hand", partial(of_people.retry_by_hand, job_id=job_id), send)


def retry_many(ids: Collection[UUID], states: Collection[JobState]) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        found = await people.retry_many(connection, list(ids), states=states)
        return _told(found)

    return Move("retry many by hand", partial(of_people.retry_many, ids=ids, states=states), send, held="passes by")


def delete_many(ids: Collection[UUID], states: Collection[JobState]) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        found = await people.delete_many(connection, list(ids), states=states)
        return {(one.job_id, one.stood, one.moved) for one in found}

    return Move("delete", partial(of_people.delete_many, ids=ids, states=states), send, held="passes by")


def request_cancel_many(ids: Collection[UUID], states: Collection[JobState]) -> Move:
    async def send(connection: AsyncConnection) -> Any:
        found = await people.request_cancel_many(connection, list(ids), ASKED, states=states)
        return {(job_id, request.stood, wanted) for job_id, request, wanted in found}

    expected = partial(of_people.request_cancel_many, ids=ids, states=states, reason=ASKED)
    return Move("request cancel of many", expected, send, held="passes by")


OF_MANY_BY_HAND = [retry_many, delete_many, request_cancel_many]


def prune(state: JobState, keep: int, batch: int) -> Move:
    assert state in FINAL

    async def send(connection: AsyncConnection) -> Any:
        return await transitions.prune(connection, state, keep=hours(keep), batch=batch)

    return Move("prune", partial(model.prune, state=state, keep=keep, batch=batch), send, held="passes by")


NAMES = (
    *(
        "enqueue",
        "enqueue in full",
        "claim",
        "claim by scan",
        "succeed",
        "succeed many",
        "retry",
        "retry, uncounted",
        "fail",
        "cancel",
    ),
    *("snooze", "release", "release many", "rescue", "request cancel", "prune"),
    *("retry by hand", "retry many by hand", "delete", "request cancel of many"),
)
OF_A_KEY = tuple(f"a key: {what}" for what in ("created", "exists", "replaced", "taken"))


async def is_waiting(there: AsyncConnection, pid: int, sent: asyncio.Future[Any]) -> None:
    """Return once the backend waits for a row that the transaction on `there` holds; it must not go on without."""
    query = text("SELECT pg_backend_pid() = ANY(pg_blocking_pids(:pid))")
    while not (await there.execute(query, {"pid": pid})).scalar():
        assert not sent.done(), f"did not wait for the row that another transaction holds: {sent}"
