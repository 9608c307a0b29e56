"""Publish: after the commit, in the background, and nobody's commit waits or fails for it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.proxy import Proxy, redis_proxy
from tests.support import heard, hints, row, until
from worker.broker import scripts
from worker.broker.connection import connect
from worker.broker.hints import Hint, due_at
from worker.core.priority import DEFAULT_PRIORITY
from worker.db.ids import uuid7
from worker.flow import publish as module
from worker.flow.enqueue import enqueue
from worker.flow.publish import Publisher, default_publisher, flush_hints
from worker.observe.events import PublishFailed
from worker.settings import Settings

LEASE = timedelta(seconds=10)
HERE = uuid7()


def a_hint() -> Hint:
    return Hint(uuid7(), "tests.noop", "default", due_at(0.0), 1, HERE, DEFAULT_PRIORITY)


@pytest.fixture
async def proxied(redis_url: str) -> AsyncIterator[tuple[Proxy, Publisher]]:
    """A publisher whose Redis is behind a proxy."""
    async with redis_proxy(redis_url) as (proxy, url):
        publisher = Publisher(connect(url, timeout=timedelta(seconds=2)), lease=LEASE, closes_redis=True)
        yield proxy, publisher
        await publisher.close()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many hints went with each pipeline."""
    sent: list[int] = []
    real = scripts.publish

    async def recording(redis: ArqRedis, hints: Sequence[Hint], **options: Any) -> int:
        sent.append(len(hints))
        return await real(redis, hints, **options)

    monkeypatch.setattr(scripts, "publish", recording)
    return sent


async def test_whatever_keeps_hints_from_being_sent_they_are_given_up_and_said(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def closed(*_: object, **__: object) -> int:
        raise RuntimeError("Event loop is closed")

    monkeypatch.setattr(scripts, "publish", closed)
    async with heard() as events:
        publisher.publish([a_hint(), a_hint()])
        await publisher.flush()

    assert events == [PublishFailed(hints=2, error="RuntimeError: Event loop is closed")]


async def test_hints_of_one_tick_go_in_one_pipeline(publisher: Publisher, redis: ArqRedis, batches: list[int]) -> None:
    told = [a_hint() for _ in range(5)]

    for hint in told:
        publisher.publish([hint])
    await publisher.flush()

    assert batches == [5]
    assert set(await hints(redis)) == {str(hint.job_id) for hint in told}


async def test_what_comes_while_a_pipeline_is_on_its_way_goes_with_the_next(
    publisher: Publisher, redis: ArqRedis, batches: list[int]
) -> None:
    publisher.publish([a_hint()])
    await until(lambda: batches, "the first pipeline is sent")
    publisher.publish([a_hint(), a_hint()])
    publisher.publish([a_hint()])
    await publisher.flush()

    assert batches == [1, 3]
    assert len(await hints(redis)) == 4


async def test_a_flood_goes_in_pipelines_of_a_thousand(
    publisher: Publisher, redis: ArqRedis, batches: list[int]
) -> None:
    publisher.publish([a_hint() for _ in range(2_500)])
    await publisher.flush()

    assert batches == [1000, 1000, 500]
    assert len(await hints(redis)) == 2_500


@pytest.mark.parametrize("fault", ["silent", "refused"])
async def test_a_commit_neither_waits_for_redis_nor_fails_with_it(
    engine: AsyncEngine, proxied: tuple[Proxy, Publisher], fault: str
) -> None:
    proxy, publisher = proxied
    if fault == "silent":
        proxy.silence()
    else:
        proxy.refuse()
    order: list[str] = []

    async with heard() as told:
        async with AsyncSession(engine, info=publisher.info) as session:
            job = await enqueue(session, "tests.noop")
            await session.commit()
            order += [type(one).__name__ for one in told] + ["committed"]
        await publisher.flush()
        order += [type(one).__name__ for one in told]

    assert order == ["committed", "PublishFailed"]
    assert (await row(engine, job.id)).state == "queued"


async def test_after_a_failure_it_is_silent_for_a_while_and_then_publishes_again(
    proxied: tuple[Proxy, Publisher], redis: ArqRedis, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, publisher = proxied
    monkeypatch.setattr(module, "_SILENCE", timedelta(seconds=1))
    proxy.refuse()
    async with heard() as told:
        publisher.publish([a_hint()])
        await publisher.flush()
    proxy.restore()

    publisher.publish([a_hint()])
    in_silence = list(batches)
    await until(lambda: _published(publisher, batches), "it publishes again")
    await publisher.flush()

    assert [type(one) for one in told] == [PublishFailed]
    assert in_silence == [1]
    assert len(await hints(redis)) == 1


def _published(publisher: Publisher, batches: list[int]) -> bool:
    if len(batches) == 1:
        publisher.publish([a_hint()])
    return len(batches) > 1


async def test_a_failure_drops_what_waits_behind_it_instead_of_failing_once_for_each(
    proxied: tuple[Proxy, Publisher], batches: list[int]
) -> None:
    proxy, publisher = proxied
    proxy.refuse()

    async with heard() as told:
        publisher.publish([a_hint() for _ in range(2_500)])
        await publisher.flush()

    assert [one.hints for one in told if isinstance(one, PublishFailed)] == [2_500]
    assert batches == [1000]


async def test_the_buffer_has_a_limit(publisher: Publisher, monkeypatch: pytest.MonkeyPatch, redis: ArqRedis) -> None:
    monkeypatch.setattr(module, "_BUFFER_LIMIT", 2)

    for _ in range(5):
        publisher.publish([a_hint()])
    await publisher.flush()

    assert len(await hints(redis)) == 2


async def test_flush_returns_at_once_when_nothing_was_told(publisher: Publisher) -> None:
    async with asyncio.timeout(10):
        await publisher.flush()


@pytest.mark.leaves_hints  # of others, or of jobs that it made up
async def test_the_default_publisher_is_one_for_each_loop_and_flush_hints_closes_it(
    settings: Settings, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_settings", lambda: settings)
    hint = a_hint()

    first = default_publisher()
    first.publish([hint])
    again = default_publisher()
    elsewhere = await asyncio.to_thread(lambda: asyncio.run(_default_elsewhere()))
    await flush_hints()
    await flush_hints()
    fresh = default_publisher()

    assert first is again
    assert first is not elsewhere
    assert first is not fresh
    assert set(await hints(redis)) == {str(hint.job_id)}
    await flush_hints()


async def _default_elsewhere() -> Publisher:
    return default_publisher()


@pytest.mark.leaves_hints  # of others, or of jobs that it made up
async def test_publishers_of_loops_that_are_closed_do_not_pile_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_settings", lambda: settings)

    async def publish_and_wait() -> None:
        publisher = default_publisher()
        publisher.publish([a_hint()])
        await publisher.flush()
        await publisher._redis.aclose()

    for _ in range(3):
        await asyncio.to_thread(lambda: asyncio.run(publish_and_wait()))
    default_publisher()
    gc.collect()

    assert [loop.is_closed() for loop in module._of_loop] == [False]
    await flush_hints()


async def test_a_session_without_a_publisher_uses_the_loops_own(
    engine: AsyncEngine, settings: Settings, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_settings", lambda: settings)

    async with AsyncSession(engine) as session:
        job = await enqueue(session, "tests.noop")
        await session.commit()
    await flush_hints()

    assert set(await hints(redis)) == {str(job.id)}
