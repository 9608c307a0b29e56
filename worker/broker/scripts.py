"""One typed function for each Lua file; scripts go by their text, so a Redis that forgot them is no case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from typing import Any, Final

from arq.connections import ArqRedis
from redis.exceptions import ResponseError

from worker.broker.hints import Hint
from worker.broker.keys import PAYLOAD_PREFIX, queue_key, wake_key
from worker.observe.events import QueueKeyTaken, emit


def _source(name: str) -> str:
    return files("worker.broker").joinpath(name).read_text(encoding="utf-8")


_PUBLISH: Final = _source("publish.lua")
_CLAIM: Final = _source("claim.lua")
_DROP: Final = _source("drop.lua")
_PUTBACK: Final = _source("putback.lua")
_PAYLOAD_OUTLIVES_MS: Final = 86_400_000  # ARQ's own day


@dataclass(frozen=True, slots=True)
class Taken:
    """Hints that a claim has hidden: raw id → the score it had, and the score that the claim wrote."""

    queue: str
    score: int
    hints: dict[bytes, float]
    next_due: timedelta | None


async def publish(redis: ArqRedis, hints: Sequence[Hint], *, lease: timedelta, only_astray: bool = False) -> int:
    """Put hints into their queues in one pipeline and wake one worker of each; returns how many were put.

    With `only_astray`, a hint is put only if it is missing or scored later than a claim could have moved it.
    """
    mode = "astray" if only_astray else "always"
    queues = sorted({hint.queue for hint in hints})
    async with redis.pipeline(transaction=False) as pipe:
        for queue in queues:
            arguments: list[Any] = [mode, _ms(lease), PAYLOAD_PREFIX, _PAYLOAD_OUTLIVES_MS]
            for hint in hints:
                if hint.queue == queue:
                    arguments += (str(hint.job_id), round(hint.due_in * 1000), hint.payload)
            pipe.eval(_PUBLISH, 2, queue_key(queue), wake_key(queue), *arguments)
        replies = await pipe.execute(raise_on_error=False)
    return sum(_put(queue, reply) for queue, reply in zip(queues, replies, strict=True))


def _put(queue: str, reply: Any) -> int:
    """How many hints were put; somebody else's key in the place of a queue must not cost the other queues theirs."""
    if isinstance(reply, ResponseError) and "WRONGTYPE" in str(reply):
        emit(QueueKeyTaken(queue=queue, error=str(reply)))
        return 0
    if isinstance(reply, Exception):
        raise reply
    return int(reply)


async def claim(redis: ArqRedis, queue: str, *, limit: int, lease: timedelta) -> Taken:
    """Take up to `limit` due hints of a queue; each comes back after `lease` unless it is dropped."""
    reply = await redis.eval(_CLAIM, 2, queue_key(queue), wake_key(queue), str(limit), str(_ms(lease)))  # type: ignore[misc]
    score, wait, *pairs = reply
    hints = {pairs[i]: float(pairs[i + 1]) for i in range(0, len(pairs), 2)}
    return Taken(queue, int(score), hints, timedelta(milliseconds=int(wait)) if int(wait) >= 0 else None)


async def drop(redis: ArqRedis, queue: str, taken: Iterable[tuple[bytes, int]]) -> int:
    """Remove hints, each only while its score is still the one its claim wrote; returns how many went."""
    arguments = [part for raw, score in taken for part in (raw, score)]
    return int(await redis.eval(_DROP, 1, queue_key(queue), PAYLOAD_PREFIX, *arguments))  # type: ignore[misc, arg-type]


async def put_back(redis: ArqRedis, taken: Taken, waits: dict[bytes, timedelta] | None = None) -> int:
    """Undo a claim: all hints with their old scores, or those in `waits` to be due again after that wait."""
    arguments: list[Any] = []
    if waits is None:
        for raw, old_score in taken.hints.items():
            arguments += (raw, taken.score, "at", old_score)
    else:
        for raw, wait in waits.items():
            arguments += (raw, taken.score, "in", _ms(wait))
    return int(await redis.eval(_PUTBACK, 1, queue_key(taken.queue), *arguments))  # type: ignore[misc]


async def payloads(redis: ArqRedis, ids: Sequence[bytes]) -> dict[bytes, bytes | None]:
    """The payloads beside these hints, None where there is none."""
    found = await redis.mget([PAYLOAD_PREFIX.encode() + raw for raw in ids])
    return dict(zip(ids, found, strict=True))


async def wait_for_hint(redis: ArqRedis, queues: Sequence[str], *, limit: timedelta) -> None:
    """Return when a hint was put into one of these queues, at the latest after `limit`."""
    await redis.blpop([wake_key(queue) for queue in queues], timeout=limit.total_seconds())  # type: ignore[misc, arg-type]


def _ms(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)
