"""What is enqueued by SQL starts at once: one worker hears of it, and when that one dies another does."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.life import jobs_for_tests as jobs
from tests.pooler import a_pooler
from tests.processes import worker_process
from tests.servers import TestServers
from tests.support import a_job, a_work, a_worker, heard, hints, state, until
from worker.db import notifications, reads
from worker.db.send import once
from worker.db.turns import RELAY
from worker.flow.work import Work
from worker.observe.events import StepFailed
from worker.resources import open_relay_engine
from worker.settings import Settings
from worker.upkeep.loop import every
from worker.upkeep.relay import relay


@pytest.fixture
def direct(settings: Settings, database_url: str) -> Settings:
    """The settings of a worker that reaches PostgreSQL itself, whatever stands before the others'."""
    return changed(settings, database={"url": database_url, "pooler": None})


def changed(settings: Settings, **sections: dict[str, Any]) -> Settings:
    update = {name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    return settings.model_copy(update=update)


async def enqueued(engine: AsyncEngine, name: str = "tests.nothing", how_often: int = 1) -> list[UUID]:
    """Enqueued by SQL, in one transaction."""
    query = text("SELECT exarq.enqueue(:name, queue => 'default') FROM generate_series(1, :how_often)")
    async with engine.begin() as connection:
        return list((await connection.execute(query, {"name": name, "how_often": how_often})).scalars())


async def who_listens(engine: AsyncEngine) -> list[tuple[int, str]]:
    """The pid and the name of each connection that has the listener's lock."""
    query = text(
        "SELECT pid, application_name FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE locktype = 'advisory' AND granted AND objid = :key AND classid = :high"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    key = {"key": notifications._LOCK & 0xFFFF_FFFF, "high": notifications._LOCK >> 32}
    async with engine.connect() as connection:
        return [(pid, name) for pid, name in await connection.execute(query, key)]


async def listens(engine: AsyncEngine, redis: ArqRedis) -> str:
    """Who listens, once it has heard of a job."""
    probes = set()

    async def is_heard() -> bool:
        async with engine.begin() as connection:
            (found,) = (await connection.execute(text("SELECT exarq.enqueue('tests.nothing', queue => 'probe')"))).one()
        probes.add(str(found))
        return bool(probes & set(await hints(redis, "probe")))

    await until(is_heard, "somebody listens")
    ((_, name),) = await until(lambda: who_listens(engine), "somebody has the lock")
    return str(name)


@asynccontextmanager
async def relaying(settings: Settings, url: str) -> AsyncIterator[Work]:
    """A worker's parts of which the relay works, and nothing else."""
    async with a_work(settings) as work:
        step, never = partial(relay, work, partial(open_relay_engine, settings, url, work.identity)), asyncio.Event()
        task = asyncio.create_task(every(timedelta(milliseconds=50), "relay", step, never))
        try:
            yield work
        finally:
            task.cancel()
            await asyncio.wait([task])


# ── it is heard ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_worker_starts_what_is_enqueued_by_sql_without_a_round_of_upkeep(
    engine: AsyncEngine, redis: ArqRedis, direct: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def rests(*_args: object) -> None:
        pass

    monkeypatch.setattr("worker.alive.reconcile", rests)
    async with a_worker(direct, jobs.registry()):
        await listens(engine, redis)

        ids = await enqueued(engine, how_often=20)

        await until(lambda: _are(engine, "succeeded", *ids), "all run")


async def test_what_one_transaction_enqueues_is_published_whatever_its_number(
    engine: AsyncEngine, redis: ArqRedis, direct: Settings, database_url: str
) -> None:
    async with relaying(direct, database_url):
        await listens(engine, redis)

        ids = await enqueued(engine, how_often=2_500)

        await until(lambda: _holds(hints(redis), {str(job) for job in ids}), "Redis knows all of them")


async def test_a_lie_is_not_believed_and_the_truth_behind_it_is_heard(
    engine: AsyncEngine, redis: ArqRedis, direct: Settings, database_url: str
) -> None:
    done = await a_job(engine, state="succeeded")
    async with heard() as events, relaying(direct, database_url):
        await listens(engine, redis)

        async with engine.begin() as connection:
            for payload in ("", "nonsense", str(uuid4()), str(done), "x" * 7_000):
                await connection.execute(text("SELECT pg_notify('exarq', :payload)"), {"payload": payload})
        (job,) = await enqueued(engine)

        await until(lambda: _holds(hints(redis), {str(job)}), "Redis knows the job")

    assert set(await hints(redis)) == {str(job)}
    assert not [event for event in events if isinstance(event, StepFailed)]


# ── by one process at a time ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_sweep_calls_for_a_listener_only_while_there_is_none(
    engine: AsyncEngine, redis: ArqRedis, direct: Settings, database_url: str
) -> None:
    async with a_work(direct) as other:
        sweep = partial(reads.sweep, horizon=timedelta(0), soon=timedelta(0))
        before = await once(other.processor, sweep)
        async with relaying(direct, database_url) as first:
            name = await listens(engine, redis)
            meanwhile = await once(other.processor, sweep)
        await until(lambda: _is_called_for(other.processor, sweep), "the next sweep calls for one")

    assert name == first.identity.application_name
    assert RELAY in before.due
    assert RELAY not in meanwhile.due


async def test_who_asks_while_one_listens_does_not(
    engine: AsyncEngine, redis: ArqRedis, direct: Settings, database_url: str
) -> None:
    async with relaying(direct, database_url) as first, a_work(direct) as second:
        await listens(engine, redis)

        await relay(second, partial(open_relay_engine, direct, database_url, second.identity))

        assert await who_is(engine, first.identity.application_name)


async def test_whenever_its_connection_ends_somebody_listens_again(
    engine: AsyncEngine, redis: ArqRedis, direct: Settings, database_url: str
) -> None:
    pids = []
    async with relaying(direct, database_url), relaying(direct, database_url):
        for _ in range(4):  # more often than there are processes
            await listens(engine, redis)
            ((pid, _),) = await who_listens(engine)
            pids.append(pid)
            async with engine.begin() as connection:
                await connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    assert len(set(pids)) == 4


@pytest.mark.timeout(300)  # a process starts slowly on a loaded machine
@pytest.mark.leaves_hints
async def test_when_its_process_is_killed_another_listens(
    engine: AsyncEngine, redis: ArqRedis, direct: Settings, database_url: str
) -> None:
    async with worker_process(direct, engine) as victim:
        killed = await listens(engine, redis)
        async with relaying(direct, database_url) as other:
            victim.send(signal.SIGKILL)
            await victim.ended()

            await until(lambda: who_is(engine, other.identity.application_name), "the other has the lock")
            (job,) = await enqueued(engine)
            await until(lambda: _holds(hints(redis), {str(job)}), "the other hears of it")

    assert killed != other.identity.application_name


async def who_is(engine: AsyncEngine, name: str) -> bool:
    return [found for _, found in await who_listens(engine)] == [name]


async def test_a_worker_that_has_stopped_listens_no_longer(engine: AsyncEngine, direct: Settings) -> None:
    async with a_worker(direct, jobs.registry()):
        await until(lambda: who_listens(engine), "it listens")

    assert await who_listens(engine) == []


# ── behind a pooler ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="no pgbouncer")
async def test_behind_a_pooler_a_worker_looks_each_second_whatever_its_sweep(
    engine: AsyncEngine, servers: TestServers, settings: Settings, database_url: str
) -> None:
    with a_pooler(servers.admin_url) as pooled:
        url = pooled.set(database=make_url(database_url).database).render_as_string(hide_password=False)
        through = changed(settings, database={"url": url, "pooler": "pgbouncer"}, worker={"sweep": timedelta(hours=1)})
        async with a_worker(through, jobs.registry()):
            for _ in range(3):
                (job,) = await enqueued(engine)
                await until(lambda job=job: _are(engine, "succeeded", job), "it runs")  # type: ignore[misc]

        assert await who_listens(engine) == []


async def _is_called_for(engine: AsyncEngine, sweep: Any) -> bool:
    return RELAY in (await once(engine, sweep)).due


async def _are(engine: AsyncEngine, wanted: str, *ids: UUID) -> bool:
    return {await state(engine, job) for job in ids} == {wanted}


async def _holds(awaited: Any, wanted: set[str]) -> bool:
    return wanted <= set(await awaited)
