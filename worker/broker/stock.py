"""The keys that plain ARQ's own clients look at, read and written for adopted jobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from typing import Any, Final, Literal

from arq.connections import ArqRedis
from arq.constants import abort_jobs_ss, in_progress_key_prefix, result_key_prefix, retry_key_prefix

from worker.broker.keys import PAYLOAD_PREFIX, queue_key

RESULT_KEPT: Final = timedelta(hours=1)
"""How long a result stays for ARQ's clients: ARQ's own default."""

_MIRROR: Final = files("worker.broker").joinpath("mirror.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Seen:
    """What stands in Redis about one id of plain ARQ.

    Args:
        arq_id: the id.
        payload: None where there is none any more.
        format: the first byte of the payload, else of an earlier result, which tells JSON from pickles; else nothing.
        left: how long the payload will be there; None where there is none, or for ever.
        abort_asked: whether somebody has asked to abort it.

    """

    arq_id: str
    payload: bytes | None
    format: bytes
    left: timedelta | None
    abort_asked: bool


@dataclass(frozen=True, slots=True)
class Said:
    """How one adopted job stands, in the words of `mirror.lua`.

    Args:
        arq_id: its id in ARQ.
        queue: its queue.
        payload: as it was read; what has another by now is left alone.
        word: whether it waits, runs or has ended.
        again: in how long its id comes up in the queue again; of what has ended, how long the result is kept.
        result: of what has ended.

    """

    arq_id: str
    queue: str
    payload: bytes | None
    word: Literal["waits", "runs", "ended"]
    again: timedelta = timedelta(0)
    result: bytes | None = None


async def now_ms(redis: ArqRedis) -> int:
    """The time by Redis' own clock, in milliseconds."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def look(redis: ArqRedis, arq_ids: Sequence[str]) -> list[Seen]:
    """What stands in Redis about these."""
    if not arq_ids:
        return []
    async with redis.pipeline(transaction=False) as pipe:
        pipe.mget([PAYLOAD_PREFIX + id_ for id_ in arq_ids])
        pipe.zmscore(abort_jobs_ss, list(arq_ids))
        for id_ in arq_ids:
            pipe.pttl(PAYLOAD_PREFIX + id_)
            pipe.getrange(result_key_prefix + id_, 0, 0)
        payloads, aborts, *others = await pipe.execute()
    return [
        Seen(id_, payload, (payload or format_)[:1], _left(ms), abort is not None)
        for id_, payload, abort, ms, format_ in zip(arq_ids, payloads, aborts, others[::2], others[1::2], strict=True)
    ]


async def aborted(redis: ArqRedis, arq_ids: Sequence[str]) -> list[str]:
    """Those of these that somebody has asked to abort."""
    scores = await redis.zmscore(abort_jobs_ss, list(arq_ids))
    return [id_ for id_, score in zip(arq_ids, scores, strict=True) if score is not None]


async def mirror(redis: ArqRedis, said: Iterable[Said], *, silence: timedelta) -> None:
    """Have Redis say this, in one pipeline; what runs is in progress for `silence` without another word."""
    async with redis.pipeline(transaction=False) as pipe:
        for one in said:
            ended = one.word == "ended"
            last: Any = (one.result or b"") if ended else _ms(silence)
            keys = (queue_key(one.queue), *(prefix + one.arq_id for prefix in _PREFIXES), abort_jobs_ss)
            arguments: tuple[Any, ...] = (one.arq_id, one.payload or b"", one.word, _ms(one.again), last)
            pipe.eval(_MIRROR, len(keys), *keys, *arguments)
        await pipe.execute()


_PREFIXES: Final = (PAYLOAD_PREFIX, in_progress_key_prefix, result_key_prefix, retry_key_prefix)


async def has_ids(redis: ArqRedis, queue: str) -> bool:
    """Whether anything is in a queue, due or not."""
    return bool(await redis.exists(queue_key(queue)))


async def due_after(
    redis: ArqRedis, queue: str, moment_ms: float, *, skip: int, count: int
) -> list[tuple[bytes, float]]:
    """The ids of a queue that are due after this moment, first by due time, each with its score."""
    page = await redis.zrangebyscore(queue_key(queue), f"({moment_ms:.0f}", "+inf", skip, count, withscores=True)
    return list(page)


def _left(ms: int) -> timedelta | None:
    """What PTTL says; some want a job to stay for longer than a timedelta can hold."""
    return timedelta(milliseconds=min(ms, timedelta.max // timedelta(milliseconds=1))) if ms >= 0 else None


def _ms(duration: timedelta) -> int:
    return max(0, round(duration.total_seconds() * 1000))
