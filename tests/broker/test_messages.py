"""Messages: told to who listens, and never believed further than they can be read."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from arq.connections import ArqRedis

from tests.broker.listeners import listeners, listening
from tests.proxy import redis_proxy
from tests.support import until
from worker.broker import messages
from worker.broker.connection import UNREACHABLE, connect
from worker.broker.keys import workers_channel
from worker.broker.messages import CancelAsked
from worker.db.ids import uuid7

GARBAGE = [
    b"",
    b" ",
    b"\xff\xfe\x00",
    b"null",
    b"{}",
    b"x" * 1_000_000,
    b"0199c0de-0000-7000-8000-000000000000",
    b"0199c0de-0000-7000-8000-000000000000 ",
    b"0199c0de-0000-7000-8000-000000000000 0199c0de-0000-7000-8000-000000000000 more",
    b"cancel 0199c0de-0000-7000-8000-000000000000 0199c0de-0000-7000-8000-000000000000 more",
    b"await 0199c0de-0000-7000-8000-000000000000",
    b"await  0199c0de-0000-7000-8000-000000000000 ",
    b"cancelled ",
    b"cancelled 0199c0de-0000-7000-8000-000000000000 0199c0de-0000-7000-8000-000000000000",
    b"0199C0DE-0000-7000-8000-000000000000 0199c0de-0000-7000-8000-000000000000",
    b"\n".join([b"0199c0de-0000-7000-8000-000000000000"] * 2),
]


def asked(installation: UUID) -> CancelAsked:
    return CancelAsked(uuid7(), uuid7(), installation)


async def test_what_is_told_is_heard_in_its_order_by_the_installations_own_listeners(broker: ArqRedis) -> None:
    here, there = uuid4(), uuid4()
    ours, theirs = [asked(here) for _ in range(3)], asked(there)

    async with listening(broker, here) as told, listening(broker, there) as told_there:
        await messages.tell(broker, [ours[0], theirs, *ours[1:]])
        await until(lambda: len(told) == 3 and told_there, "all is heard")

    assert told == ours
    assert told_there == [theirs]


async def test_what_nobody_hears_is_no_error(broker: ArqRedis) -> None:
    await messages.tell(broker, [asked(uuid4())])
    await messages.tell(broker, [])


async def test_what_cannot_be_read_is_passed_over(broker: ArqRedis) -> None:
    here = uuid4()
    ours = asked(here)

    async with listening(broker, here) as told:
        for data in GARBAGE:
            await broker.publish(workers_channel(here), data)
        await messages.tell(broker, [ours])
        await until(lambda: told, "the message behind it is heard")

    assert told == [ours]


async def test_the_message_names_neither_token_nor_arguments() -> None:
    ours = asked(uuid4())

    assert ours.message == f"cancel {ours.worker_id} {ours.job_id}"


async def test_a_quiet_channel_is_asked_for_a_sign_and_heard_on(
    broker: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = uuid4()
    ours, signs = asked(here), 0
    data = messages._data

    def counted(said: dict[str, object]) -> bytes | None:
        nonlocal signs
        signs += said["type"] == "pong"
        return data(said)

    monkeypatch.setattr(messages, "_QUIET", timedelta(milliseconds=20))
    monkeypatch.setattr(messages, "_data", counted)
    async with listening(broker, here) as told:
        await until(lambda: signs >= 3, "Redis gave signs of life")
        await messages.tell(broker, [ours])
        await until(lambda: told, "it is heard")

    assert told == [ours]


async def test_who_listens_no_longer_leaves_no_subscription_and_no_connection(redis: ArqRedis) -> None:
    here = uuid4()

    for _ in range(25):  # more than the pool has connections
        async with listening(redis, here):
            pass

    await until(lambda: _is_zero(redis, here), "nobody listens")


async def _is_zero(redis: ArqRedis, installation: UUID) -> bool:
    return await listeners(redis, installation) == 0


@pytest.mark.parametrize("how", ["refuses", "is silent"])
async def test_a_redis_that_goes_away_ends_the_listening(
    redis: ArqRedis, redis_url: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_QUIET", timedelta(milliseconds=20))
    here = uuid4()
    async with redis_proxy(redis_url) as (proxy, url):
        timeout = timedelta(seconds=3 if how == "is silent" else 30)
        client = connect(url, timeout=timeout)
        told = messages.told_to_workers(client, here, timeout=timeout)
        waiting = asyncio.ensure_future(anext(told))
        await until(lambda: listeners(redis, here), "somebody listens")

        if how == "refuses":
            proxy.refuse()
        else:
            proxy.silence()

        with pytest.raises(UNREACHABLE):
            await waiting
        await told.aclose()
        proxy.restore()
        await client.aclose()
