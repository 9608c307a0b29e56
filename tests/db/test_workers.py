"""The rows of the workers: who is alive, who may be rescued, and by whom."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests.db.conftest import statements_of
from tests.db.moves import send
from tests.support import a_job
from worker.core.states import JobState
from worker.db import workers
from worker.db.ids import uuid7
from worker.db.models import Worker


async def a_registered(engine: AsyncEngine) -> UUID:
    worker_id = uuid7()
    await send(engine, lambda c: workers.register(c, worker_id, queues=["a", "b"], concurrency=7))
    return worker_id


async def worker_row(engine: AsyncEngine, worker_id: UUID) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(select(Worker.__table__).where(Worker.id == worker_id))).first()


async def still_silent(engine: AsyncEngine, worker_id: UUID, seen: int | None) -> Any:
    return await send(engine, lambda c: workers.still_silent(c, worker_id, seen))


async def test_a_worker_registers_with_what_it_does_and_has_not_beaten_yet(engine: AsyncEngine) -> None:
    worker_id = await a_registered(engine)

    found = await worker_row(engine, worker_id)
    assert (found.queues, found.concurrency, found.beat, found.stopping_at) == (["a", "b"], 7, 0, None)


async def test_a_beat_moves_the_row_on_and_tells_that_it_is_there(engine: AsyncEngine) -> None:
    worker_id = await a_registered(engine)
    before = await worker_row(engine, worker_id)

    alive, _ = await send(engine, lambda c: workers.beat(c, worker_id))

    after = await worker_row(engine, worker_id)
    assert alive is True
    assert after.beat == 1
    assert after.beat_at > before.beat_at


async def test_a_beat_without_a_row_tells_that_the_worker_was_given_up(engine: AsyncEngine) -> None:
    assert await send(engine, lambda c: workers.beat(c, uuid7())) == (False, {})


@pytest.mark.leaves_running
async def test_a_beat_without_a_look_reads_no_jobs(engine: AsyncEngine) -> None:
    worker_id = uuid7()
    await send(engine, lambda c: workers.register(c, worker_id, queues=["a"], concurrency=1))
    await a_job(engine, state=JobState.RUNNING, worker_id=worker_id)

    with statements_of(engine) as sent:
        found = await send(engine, lambda c: workers.beat(c, worker_id, looks=False))

    assert found == (True, None)
    assert await send(engine, lambda c: workers.beat(c, uuid7(), looks=False)) == (False, None)
    assert not any("exarq.job" in statement for statement in sent)


async def test_a_worker_is_silent_only_at_the_beat_that_was_seen(engine: AsyncEngine) -> None:
    worker_id = await a_registered(engine)
    await send(engine, lambda c: workers.beat(c, worker_id))

    found = [await still_silent(engine, worker_id, seen) for seen in (1, 0, None)]

    assert found == [(True, False), (False, False), (False, False)]


async def test_a_worker_without_a_row_is_silent_if_none_was_seen(engine: AsyncEngine) -> None:
    found = [await still_silent(engine, uuid7(), seen) for seen in (None, 4)]

    assert found == [(True, False), (False, False)]


async def test_a_stop_that_was_announced_is_told_to_the_rescuer(engine: AsyncEngine) -> None:
    worker_id = await a_registered(engine)

    await send(engine, lambda c: workers.announce_stop(c, worker_id))

    assert await still_silent(engine, worker_id, 0) == (True, True)


async def test_a_beat_waits_for_a_rescuer_that_has_seen_silence(engine: AsyncEngine) -> None:
    worker_id = await a_registered(engine)

    async with engine.begin() as rescuer:
        await workers.still_silent(rescuer, worker_id, 0)
        beating = asyncio.create_task(send(engine, lambda c: workers.beat(c, worker_id)))
        _, waiting = await asyncio.wait([beating], timeout=0.2)
        await workers.unregister(rescuer, worker_id)

    assert waiting
    assert (await beating).alive is False


async def test_one_rescuer_at_a_time_for_each_worker(engine: AsyncEngine) -> None:
    dead, other = uuid7(), uuid7()

    async with engine.connect() as first, engine.connect() as second:
        found = [await workers.lock_for_rescue(first, dead), await workers.lock_for_rescue(second, dead)]
        of_another = await workers.lock_for_rescue(second, other)
        await first.rollback()
        later = await workers.lock_for_rescue(second, dead)

    assert found == [True, False]
    assert (of_another, later) == (True, True)


@pytest.mark.leaves_running
async def test_a_worker_under_whose_id_jobs_run_keeps_its_row(engine: AsyncEngine) -> None:
    busy, idle = await a_registered(engine), await a_registered(engine)
    await a_job(engine, state=JobState.RUNNING, worker_id=busy)
    await a_job(engine, state=JobState.SUCCEEDED, worker_id=idle)

    for worker_id in (busy, idle):
        await send(engine, lambda c, worker_id=worker_id: workers.unregister(c, worker_id))  # type: ignore[misc]  # mypy cannot infer a lambda with a default

    assert await worker_row(engine, busy) is not None
    assert await worker_row(engine, idle) is None


async def test_what_a_dead_worker_left_connected_is_ended_and_nobody_else(engine: AsyncEngine) -> None:
    dead, other = f"exarq {uuid7()}", f"exarq {uuid7()}"
    zombies = [
        create_async_engine(engine.url, connect_args={"server_settings": {"application_name": name}})
        for name in (dead, other)
    ]
    names = text("SELECT application_name FROM pg_stat_activity WHERE application_name IN (:dead, :other)")

    async with zombies[0].connect() as zombie, zombies[1].connect() as alive:
        await zombie.execute(text("LOCK TABLE exarq.job"))
        await alive.execute(text("SELECT 1"))
        await send(engine, lambda c: workers.end_backends(c, dead))

        async with engine.connect() as connection:
            left = (await connection.execute(names, {"dead": dead, "other": other})).scalars().all()
            await connection.execute(text("LOCK TABLE exarq.job NOWAIT"))
        await zombie.invalidate()
    for zombie_engine in zombies:
        await zombie_engine.dispose()

    assert left == [other]
