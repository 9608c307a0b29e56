"""Adopt: make a row for a job that plain ARQ code put into Redis, committed before anything of it leaves Redis."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from arq.connections import ArqRedis
from arq.constants import expires_extra_ms
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.broker import stock
from worker.broker.connection import UNREACHABLE
from worker.broker.hints import Hint, due_at, ms_of
from worker.broker.payloads import Enqueued, Unreadable
from worker.broker.stock import RESULT_KEPT, Said, Seen
from worker.core.codec import encode_plain
from worker.core.outcome import ErrorText
from worker.core.retry import LONGEST_DELAY
from worker.core.signature import POSITIONAL
from worker.core.states import JobState
from worker.db import adopted, transitions
from worker.db.adopted import Adopted
from worker.db.failures import is_transient
from worker.db.ids import adopted_id
from worker.db.statements.adopt import GIVEN
from worker.flow.after_commit import HORIZON
from worker.flow.mirror import expired
from worker.flow.work import Work
from worker.observe.events import JobsAdopted, PlainJobExpired, StepFailed, emit

UNREADABLE: Final = "arq.unreadable"
"""The name of a job whose payload is none."""

_ARQS_DAY: Final = timedelta(milliseconds=expires_extra_ms)
_EXACT_WITHIN: Final = timedelta(minutes=1)
_LONGEST_OVERDUE: Final = timedelta(days=1)
_LONGEST_ID: Final = 1_000
_MOST_KEPT: Final = 64 * 1024 * 1024


def arq_id_of(raw: bytes) -> str | None:
    """An id as plain ARQ has it; None for what PostgreSQL cannot keep."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    return text if len(raw) <= _LONGEST_ID and "\0" not in text else None


async def adopt_all(
    work: Work, redis: ArqRedis, connection: AsyncConnection, queue: str, scores: Mapping[str, float]
) -> None:
    """Adopt these as `adopt` does; one that cannot be is told of and left where it is, and keeps no other from it."""
    try:
        await adopt(work, redis, connection, queue, scores)
    except Exception as error:
        if _is_away(error):
            raise
        ids = list(scores)
        if len(ids) == 1:
            emit(StepFailed(step=f"adopt {ids[0]}", error=f"{type(error).__name__}: {error}"))
            return
        middle = len(ids) // 2
        for half in (ids[:middle], ids[middle:]):
            await adopt_all(work, redis, connection, queue, {arq_id: scores[arq_id] for arq_id in half})


def _is_away(error: Exception) -> bool:
    """Whether it is the server's doing, PostgreSQL's or Redis', and not that of what was to be adopted."""
    return is_transient(error) or (isinstance(error, UNREACHABLE) and "WRONGTYPE" not in str(error))


async def adopt(
    work: Work, redis: ArqRedis, connection: AsyncConnection, queue: str, scores: Mapping[str, float]
) -> None:
    """Adopt these, each with its score; what was adopted before stays the job it is, and Redis is told how it stands.

    Args:
        work: the worker's parts.
        redis: the client.
        connection: in AUTOCOMMIT, so that a row is committed once its statement is answered.
        queue: where they wait.
        scores: when each is due, in milliseconds by Redis' clock.

    """
    now = await stock.now_ms(redis)
    seen = await stock.look(redis, sorted(scores))  # two workers that adopt the same ones must not lock each other out
    read = {one.arq_id: work.mirror.payloads.read(one.payload) for one in seen if one.payload is not None}
    rows = [_row(work, queue, one, read[one.arq_id], scores[one.arq_id], now) for one in seen if one.arq_id in read]
    new = await transitions.adopt(connection, {f"{name}s": [row[name] for row in rows] for name in GIVEN})
    if new:
        emit(JobsAdopted(jobs=tuple(new)))
    enqueues = [(one.arq_id, read[one.arq_id].at if one.arq_id in read else None) for one in seen]
    jobs = await adopted.by_enqueue(connection, enqueues, told_for=RESULT_KEPT)
    for one in seen:
        if one.abort_asked and one.arq_id in jobs and not jobs[one.arq_id].has_ended:
            await work.mirror.abort(jobs[one.arq_id])
    work.publisher.publish(_hints(work, jobs.values()))
    await work.mirror.say(list(jobs.values()), seen)
    await _end_expired(work, redis, queue, [one.arq_id for one in seen if one.arq_id not in jobs])


def _row(work: Work, queue: str, seen: Seen, read: Enqueued | Unreadable, score: float, now: int) -> dict[str, Any]:
    assert seen.payload is not None
    delay = min(max(timedelta(milliseconds=_bounded(score - now)), -_LONGEST_OVERDUE), LONGEST_DELAY)
    row: dict[str, Any] = {
        "id": adopted_id(),
        "name": UNREADABLE,
        "queue": queue,
        "args": None,
        "age": timedelta(0),
        "delay": delay,
        "expires_in": None,
        "attempt": 0,
        "error": None,
        "arq_id": seen.arq_id,
        "arq_enqueued": read.at,
    }
    error: ErrorText | None
    if isinstance(read, Unreadable):
        error = read.why
    else:
        age = timedelta(milliseconds=_bounded(now - read.at))
        row |= {"name": read.name, "age": max(age, timedelta(0)), "attempt": read.tries - 1}
        row["expires_in"] = _deadline(seen.left, age, delay)
        row["args"], error = _arguments(work, read)
    if error is not None:
        row["error"] = f"{error.type}: {error.message}"
        row["args"] = json.dumps({"payload_base64": base64.b64encode(seen.payload[:_MOST_KEPT]).decode()})
    return row


def _arguments(work: Work, read: Enqueued) -> tuple[str | None, ErrorText | None]:
    """The arguments by name; by position, too, where another worker knows the function and this one does not."""
    try:
        if read.name in work.registry:
            return work.registry.get(read.name).signature.bind(*read.args, **read.kwargs), None
        return encode_plain({**({POSITIONAL: list(read.args)} if read.args else {}), **read.kwargs}), None
    except Exception as error:
        return None, ErrorText.of(error)


def _deadline(left: timedelta | None, age: timedelta, delay: timedelta) -> timedelta | None:
    """How long `_expires` leaves a job to start; None where it is for ever, or ARQ itself has set its day."""
    if left is None or left > LONGEST_DELAY:
        return None
    due_after = max(age + delay, timedelta(0))
    is_arqs_own = abs(left + age - due_after - _ARQS_DAY) < _EXACT_WITHIN
    return None if is_arqs_own else left


def _bounded(milliseconds: float) -> float:
    """A score is anybody's: what a timedelta can hold, infinity included."""
    most = LONGEST_DELAY / timedelta(milliseconds=1)
    return min(max(milliseconds, -most), most)


def _hints(work: Work, jobs: Any) -> list[Hint]:
    """Hints of their own for those that may run soon: what is adopted runs as every other job does."""
    return [_hint(work, job) for job in jobs if job.state is JobState.QUEUED and job.wait <= HORIZON]


def _hint(work: Work, job: Adopted) -> Hint:
    due_in, at = job.wait.total_seconds(), ms_of(job.enqueued_at)
    return Hint(job.id, job.name, job.queue, due_at(due_in), at, work.installation, job.priority)


async def _end_expired(work: Work, redis: ArqRedis, queue: str, arq_ids: list[str]) -> None:
    """End in Redis, as ARQ does, what had lost its payload before anybody adopted it: nobody knows what it was."""
    if not arq_ids:
        return
    emit(PlainJobExpired(hints=tuple(arq_ids)))
    now, silence = datetime.now(UTC), timedelta(0)
    ends = [(id_, work.mirror.payloads.result(b"", **expired(id_, queue, now))) for id_ in arq_ids]
    said = [Said(id_, queue, None, "ended", RESULT_KEPT, result) for id_, result in ends]
    await stock.mirror(redis, said, silence=silence)
