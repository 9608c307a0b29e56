"""One typed function for each Lua file; scripts go by their text, so a Redis that forgot them is no case."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Final, TypeAlias
from uuid import UUID

from arq.connections import ArqRedis
from arq.constants import in_progress_key_prefix
from redis import Redis
from redis.exceptions import ResponseError

from worker.broker.hints import Hint, payload_of
from worker.broker.keys import LANE_PREFIX, PAYLOAD_PREFIX, lane_key, queue_key, wake_key
from worker.core.priority import DEFAULT_PRIORITY, STEP
from worker.observe.events import QueueKeyTaken, emit


def _source(name: str) -> str:
    return files("worker.broker").joinpath(name).read_text(encoding="utf-8")


_PUBLISH: Final = _source("publish.lua")
_CLAIM: Final = _source("claim.lua")
_DROP: Final = _source("drop.lua")
_PUTBACK: Final = _source("putback.lua")
_PAYLOAD_OUTLIVES_MS: Final = 86_400_000  # ARQ's own day
_STEP_MS: Final = str(STEP // timedelta(milliseconds=1))


Drops: TypeAlias = Mapping[int, Sequence[tuple[bytes, int]]]
"""Hints to drop by priority, each with the score that its claim wrote."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Hints that a claim has hidden: raw id → the score it had, and the score that the claim wrote.

    Args:
        queue: where they were.
        score: what the claim wrote.
        hints: raw id → the score it had.
        next_due: how long until another is due; None when there is none.
        priorities: raw id → the priority whose lane it is in, where that is not the ordinary one.

    """

    queue: str
    score: int
    hints: dict[bytes, float]
    next_due: timedelta | None
    priorities: dict[bytes, int] = field(default_factory=dict)

    def by_priority(self, raws: Iterable[bytes]) -> dict[int, list[bytes]]:
        """These of them, lane by lane."""
        found: dict[int, list[bytes]] = {}
        for raw in raws:
            found.setdefault(self.priorities.get(raw, DEFAULT_PRIORITY), []).append(raw)
        return found


async def publish(redis: ArqRedis, hints: Sequence[Hint], *, lease: timedelta, only_astray: bool = False) -> int:
    """Put hints into their lanes in one pipeline and wake one worker of each queue; returns how many were put.

    With `only_astray`, a hint is put only if it is missing or scored later than a claim could have moved it; and what
    a dead process of ARQ's command has left to say that it runs the job is taken away.
    """
    mode = "astray" if only_astray else "always"
    async with redis.pipeline(transaction=False) as pipe:
        queues = _add_hints(pipe, hints, lease, mode)
        replies = await pipe.execute(raise_on_error=False)
    return sum(_put(queue, reply) for queue, reply in zip(queues, replies, strict=True))


def publish_now(redis: Redis, hints: Sequence[Hint], *, lease: timedelta) -> int:
    """Like `publish`, for a program without an event loop."""
    with redis.pipeline(transaction=False) as pipe:
        queues = _add_hints(pipe, hints, lease, "always")
        replies = pipe.execute(raise_on_error=False)
    return sum(_put(queue, reply) for queue, reply in zip(queues, replies, strict=True))


def _add_hints(pipe: Any, hints: Sequence[Hint], lease: timedelta, mode: str) -> list[str]:
    """Add one call for each lane to a pipeline of either kind; returns the queue of each."""
    lanes = _alike(hints)
    for (queue, priority), groups in lanes.items():
        arguments: list[Any] = [mode, _ms(lease), PAYLOAD_PREFIX, _PAYLOAD_OUTLIVES_MS, in_progress_key_prefix]
        for (delay, name, enqueued_ms, installation), ids in groups.items():
            arguments += (delay, payload_of(name, enqueued_ms, installation), " ".join(ids))
        pipe.eval(_PUBLISH, 2, lane_key(queue, priority), wake_key(queue), *arguments)
    return [queue for queue, _ in lanes]


def _alike(hints: Sequence[Hint]) -> dict[tuple[str, int], dict[tuple[int, str, int, UUID], list[str]]]:
    """The ids by lane, and by what they share: what is enqueued together is due together, with one payload."""
    now = time.monotonic()
    lanes: dict[tuple[str, int], dict[tuple[int, str, int, UUID], list[str]]] = {}
    shared: tuple[object, ...] = ()
    ids: list[str] = []
    for hint in hints:
        if hint[1:] != shared:  # of a thousand, most share all with the one before
            name, queue, due_at, enqueued_ms, installation, priority = shared = hint[1:]
            alike = (round((due_at - now) * 1000), name, enqueued_ms, installation)
            ids = lanes.setdefault((queue, priority), {}).setdefault(alike, [])
        ids.append(str(hint.job_id))
    return lanes


def _put(queue: str, reply: Any) -> int:
    """How many hints were put; somebody else's key in the place of a queue must not cost the other queues theirs."""
    if isinstance(reply, ResponseError) and "WRONGTYPE" in str(reply):
        emit(QueueKeyTaken(queue=queue, error=str(reply)))
        return 0
    if isinstance(reply, Exception):
        raise reply
    return int(reply)


async def claim(
    redis: ArqRedis, queue: str, *, limit: int, lease: timedelta, to_drop: Drops = MappingProxyType({})
) -> Taken:
    """Take up to `limit` due hints of a queue, first by rank; each comes back after `lease` unless it is dropped.

    What is `to_drop`, of the same queue, leaves in the same round trip, as `drop` has it.
    """
    arguments = (str(limit), str(_ms(lease)), LANE_PREFIX, f":{queue}", _STEP_MS)
    async with redis.pipeline(transaction=False) as pipe:
        for priority, hints in to_drop.items():
            pipe.eval(_DROP, 1, lane_key(queue, priority), PAYLOAD_PREFIX, *_drop_arguments(hints))
        pipe.eval(_CLAIM, 2, queue_key(queue), wake_key(queue), *arguments)
        *_, reply = await pipe.execute()
    score, wait, *lanes = reply
    taken = Taken(queue, int(score), {}, timedelta(milliseconds=int(wait)) if int(wait) >= 0 else None)
    for priority, pairs in zip(lanes[::2], lanes[1::2], strict=True):
        found = {pairs[i]: float(pairs[i + 1]) for i in range(0, len(pairs), 2)}
        taken.hints.update(found)
        if priority != DEFAULT_PRIORITY:
            taken.priorities.update(dict.fromkeys(found, priority))
    return taken


async def drop(
    redis: ArqRedis, queue: str, taken: Iterable[tuple[bytes, int]], priority: int = DEFAULT_PRIORITY
) -> int:
    """Remove hints of one lane, each only while its score is the one its claim wrote; returns how many went."""
    arguments = _drop_arguments(taken)
    return int(await redis.eval(_DROP, 1, lane_key(queue, priority), PAYLOAD_PREFIX, *arguments))  # type: ignore[misc]


def _drop_arguments(taken: Iterable[tuple[bytes, int]]) -> list[Any]:
    by_score: dict[int, list[bytes]] = {}
    for raw, score in taken:
        by_score.setdefault(score, []).append(raw)
    return [part for score, raws in by_score.items() for part in (score, len(raws), *raws)]


async def put_back(redis: ArqRedis, taken: Taken, waits: dict[bytes, timedelta] | None = None) -> int:
    """Undo a claim: all hints with their old scores, or those in `waits` to be due again after that wait."""
    put = 0
    for priority, raws in taken.by_priority(taken.hints if waits is None else waits).items():
        arguments: list[Any] = []
        for raw in raws:
            due = ("at", taken.hints[raw]) if waits is None else ("in", _ms(waits[raw]))
            arguments += (raw, taken.score, *due)
        put += int(await redis.eval(_PUTBACK, 1, lane_key(taken.queue, priority), *arguments))  # type: ignore[misc]
    return put


async def payloads(redis: ArqRedis, ids: Sequence[bytes]) -> dict[bytes, bytes | None]:
    """The payloads beside these hints, None where there is none."""
    found = await redis.mget([PAYLOAD_PREFIX.encode() + raw for raw in ids])
    return dict(zip(ids, found, strict=True))


async def wait_for_hint(redis: ArqRedis, queues: Sequence[str], *, limit: timedelta) -> None:
    """Return when a hint was put into one of these queues, at the latest after `limit`."""
    await redis.blpop([wake_key(queue) for queue in queues], timeout=limit.total_seconds())  # type: ignore[misc, arg-type]


def _ms(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)
