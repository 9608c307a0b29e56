"""The message that somebody asked to cancel a running job: like a hint it may be repeated, late, lost or a lie."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from arq.connections import ArqRedis

from worker.broker.hints import parse_id
from worker.broker.keys import cancel_channel

_QUIET: Final = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Somebody asked to cancel a job that ran under this worker's id."""

    job_id: UUID
    worker_id: UUID
    installation: UUID

    @property
    def message(self) -> str:
        """What goes over the channel; never the token, which allows to write the job."""
        return f"{self.worker_id} {self.job_id}"


async def tell(redis: ArqRedis, asked: Iterable[CancelAsked]) -> None:
    """Tell the workers that listen, in one pipeline; nobody may."""
    async with redis.pipeline(transaction=False) as pipe:
        for one in asked:
            pipe.publish(cancel_channel(one.installation), one.message)
        await pipe.execute()


async def heard(redis: ArqRedis, installation: UUID, *, timeout: timedelta) -> AsyncGenerator[CancelAsked, None]:
    """What is told from now on; when nothing is, Redis is asked every few seconds whether it is still there.

    Raises: what `worker.broker.connection.UNREACHABLE` knows, when it is not, or when it refuses the channel.
    """
    async with redis.pubsub() as subscription:
        await subscription.subscribe(cancel_channel(installation))
        asked_for_a_sign = False
        while True:
            wait = timeout if asked_for_a_sign else _QUIET
            said = await subscription.get_message(timeout=wait.total_seconds())
            if said is None and asked_for_a_sign:
                raise TimeoutError(f"Redis gave no sign for {wait.total_seconds():g} s")
            asked_for_a_sign = said is None
            if said is None:
                await subscription.ping()
            elif (asked := _parsed(said, installation)) is not None:
                yield asked


def _parsed(said: dict[str, Any], installation: UUID) -> CancelAsked | None:
    """The message; None for a sign of life, and for what nobody of us has written."""
    data = said["data"]
    if said["type"] != "message" or not isinstance(data, bytes):
        return None
    worker, _, job = data.partition(b" ")
    worker_id, job_id = parse_id(worker), parse_id(job)
    if worker_id is None or job_id is None:
        return None
    return CancelAsked(job_id, worker_id, installation)
