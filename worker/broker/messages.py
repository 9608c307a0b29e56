"""What an installation's processes tell each other: like a hint, it may be repeated, late, lost or a lie."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeAlias
from uuid import UUID

from arq.connections import ArqRedis
from redis import Redis

from worker.broker.hints import parse_id
from worker.broker.keys import ended_channel, workers_channel

_QUIET: Final = timedelta(seconds=5)


class _ToAllWorkers:
    __slots__ = ()
    installation: UUID

    @property
    def channel(self) -> str:
        """All workers of the installation listen to it."""
        return workers_channel(self.installation)


@dataclass(frozen=True, slots=True)
class CancelAsked(_ToAllWorkers):
    """Somebody asked to cancel a job that ran under this worker's id."""

    job_id: UUID
    worker_id: UUID
    installation: UUID

    @property
    def message(self) -> str:
        """What goes over the channel; never the token, which allows to write the job."""
        return f"cancel {self.worker_id} {self.job_id}"


@dataclass(frozen=True, slots=True)
class Cancelled(_ToAllWorkers):
    """A job that waited was cancelled by somebody who is no worker, and only workers know who waits for it."""

    job_id: UUID
    installation: UUID

    @property
    def message(self) -> str:
        """What goes over the channel."""
        return f"cancelled {self.job_id}"


@dataclass(frozen=True, slots=True)
class EndAwaited(_ToAllWorkers):
    """Somebody waits for a job to end, for some seconds from now."""

    job_id: UUID
    waiter_id: UUID
    installation: UUID

    @property
    def message(self) -> str:
        """What goes over the channel."""
        return f"await {self.waiter_id} {self.job_id}"


@dataclass(frozen=True, slots=True)
class Ended:
    """A job has ended that this waiter waits for."""

    job_id: UUID
    waiter_id: UUID

    @property
    def channel(self) -> str:
        """The waiter alone listens to it."""
        return ended_channel(self.waiter_id)

    @property
    def message(self) -> str:
        """What goes over the channel; never the result."""
        return str(self.job_id)


ToWorkers: TypeAlias = CancelAsked | Cancelled | EndAwaited
Message: TypeAlias = ToWorkers | Ended


async def tell(redis: ArqRedis, messages: Iterable[Message]) -> None:
    """Tell whoever listens, in one pipeline; nobody may."""
    async with redis.pipeline(transaction=False) as pipe:
        for one in messages:
            pipe.publish(one.channel, one.message)
        await pipe.execute()


def tell_now(redis: Redis, messages: Iterable[Message]) -> None:
    """Like `tell`, for a program without an event loop."""
    with redis.pipeline(transaction=False) as pipe:
        for one in messages:
            pipe.publish(one.channel, one.message)
        pipe.execute()


async def told_to_workers(
    redis: ArqRedis, installation: UUID, *, timeout: timedelta
) -> AsyncGenerator[ToWorkers, None]:
    """What the workers are told from now on.

    Raises: what `worker.broker.connection.UNREACHABLE` knows, when Redis is away or refuses the channel.
    """
    async with aclosing(_heard(redis, workers_channel(installation), timeout=timeout)) as said:
        async for data in said:
            if data is not None and (message := _parsed(data, installation)) is not None:
                yield message


async def told_to_waiter(redis: ArqRedis, waiter_id: UUID, *, timeout: timedelta) -> AsyncGenerator[UUID | None, None]:
    """The jobs whose end a waiter is told of; None once it listens, and with each sign of life while all is quiet.

    Raises: as `told_to_workers`.
    """
    async with aclosing(_heard(redis, ended_channel(waiter_id), timeout=timeout)) as said:
        async for data in said:
            if data is None:
                yield None
            elif (job_id := parse_id(data)) is not None:
                yield job_id


async def _heard(redis: ArqRedis, channel: str, *, timeout: timedelta) -> AsyncGenerator[bytes | None, None]:
    """What is said; None when listening begins, and when Redis, asked in a quiet time, says that it is still there."""
    async with redis.pubsub() as subscription:
        await subscription.subscribe(channel)
        asked_for_a_sign = False
        while True:
            wait = timeout if asked_for_a_sign else _QUIET
            said = await subscription.get_message(timeout=wait.total_seconds())
            if said is None and asked_for_a_sign:
                raise TimeoutError(f"Redis gave no sign for {wait.total_seconds():g} s")
            asked_for_a_sign = said is None
            if said is None:
                await subscription.ping()
            else:
                yield _data(said)


def _data(said: dict[str, Any]) -> bytes | None:
    data = said["data"]
    return data if said["type"] == "message" and isinstance(data, bytes) else None


def _parsed(data: bytes, installation: UUID) -> ToWorkers | None:
    """The message; None for what nobody of us has written."""
    word, *raw_ids = data.split(b" ", 3)
    match word, [parse_id(raw) for raw in raw_ids]:
        case b"cancel", [UUID() as worker_id, UUID() as job_id]:
            return CancelAsked(job_id, worker_id, installation)
        case b"cancelled", [UUID() as job_id]:
            return Cancelled(job_id, installation)
        case b"await", [UUID() as waiter_id, UUID() as job_id]:
            return EndAwaited(job_id, waiter_id, installation)
        case _:
            return None
