"""Redis or PostgreSQL goes away under a running worker: jobs go on, and nobody is blamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.life import jobs_for_tests as jobs
from tests.pooler import a_pooler
from tests.processes import worker_process, workers
from tests.proxy import postgres_proxy, redis_proxy
from tests.servers import TestServers
from tests.support import a_job, a_worker, heard, row, state, until
from worker.embedded import servers as embedded
from worker.observe.events import RedisAway, RedisBack, StepFailed, WorkerRenewed, WorkerRescued
from worker.process import Worker
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]

pytestmark = [pytest.mark.timeout(300), pytest.mark.hasty]  # processes start slowly on a loaded machine


@pytest.fixture(autouse=True)
async def _effects(engine: AsyncEngine) -> None:
    await jobs.make_effects(engine)


@pytest.mark.parametrize("how", ["cut", "silent"])
async def test_without_redis_jobs_go_on_by_scan_and_back_by_hints(
    how: str, engine: AsyncEngine, sessions: Sessions, settings: Settings, redis_url: str
) -> None:
    async with redis_proxy(redis_url) as (proxy, url):
        through = _with_redis(settings, url)
        async with heard() as events, a_worker(through, jobs.registry()):
            await jobs.enqueue_all(sessions, jobs.note.call("before"))
            await until(lambda: _effects_are(engine, ["before"]), "a job has run")

            if how == "cut":
                proxy.refuse()
            else:
                proxy.silence()
            await jobs.enqueue_all(sessions, jobs.note.call("meanwhile"))
            await until(lambda: _effects_are(engine, ["before", "meanwhile"]), "jobs go on")

            proxy.restore()
            await until(lambda: any(isinstance(event, RedisBack) for event in events), "Redis is back")
            await jobs.enqueue_all(sessions, jobs.note.call("then"))
            await until(lambda: _effects_are(engine, ["before", "meanwhile", "then"]), "jobs go on")

    assert [event for event in events if isinstance(event, RedisAway)]
    assert await jobs.states(engine) == {"succeeded": 3}


async def test_a_redis_that_is_killed_and_comes_back_empty_costs_nothing(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    with embedded.start(postgres=False) as first:
        async with (
            redis_proxy(first.urls.redis_url) as (proxy, url),
            heard() as events,
            a_worker(_with_redis(settings, url), jobs.registry()),
        ):
            later = await a_job(engine, name="tests.nothing", run_at=await _in(engine, 1.5))
            await until(lambda: workers(engine), "the worker beats")

            first.stop()
            proxy.refuse()
            await jobs.enqueue_all(sessions, jobs.note.call("meanwhile"))
            await until(lambda: _effects_are(engine, ["meanwhile"]), "jobs go on")

            with embedded.start(postgres=False) as second:
                proxy.target = str(second.urls.redis and second.urls.redis.socket)
                proxy.restore()
                await until(lambda: any(isinstance(event, RedisBack) for event in events), "Redis is back")
                await until(lambda: _is(engine, later, "succeeded"), "the scheduled job runs")
                proxy.refuse()

    assert await jobs.states(engine) == {"succeeded": 2}


async def test_a_worker_starts_while_redis_is_away(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, redis_url: str
) -> None:
    async with redis_proxy(redis_url) as (proxy, url):
        proxy.refuse()
        await jobs.enqueue_all(sessions, jobs.note.call("without"))

        async with a_worker(_with_redis(settings, url), jobs.registry()):
            await until(lambda: _effects_are(engine, ["without"]), "the job runs")


@pytest.mark.parametrize("how", ["cut", "silent"])
async def test_a_worker_outlives_an_outage_of_postgresql_and_blames_no_job_that_had_not_begun(
    how: str, engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    async with (
        postgres_proxy(str(settings.database.url)) as (proxy, url),
        heard() as events,
        a_worker(_with_database(settings, url), jobs.registry()),
    ):
        await jobs.enqueue_all(sessions, jobs.note.call("before"))
        await until(lambda: _effects_are(engine, ["before"]), "a job has run")

        if how == "cut":
            proxy.refuse()
        else:
            proxy.silence()
        waiting = await jobs.enqueue_all(sessions, *(jobs.note.call(f"{n}") for n in range(5)))
        await until(lambda: any(isinstance(event, StepFailed) for event in events), "the worker notices")
        if how == "silent":
            proxy.refuse()
        proxy.restore()

        await until(lambda: _all_are(engine, waiting, "succeeded"), "jobs go on")

    assert {(found.failures, found.crashes) for found in [await row(engine, job) for job in waiting]} == {(0, 0)}
    assert len(await jobs.effects(engine)) == 6
    assert not [event for event in events if isinstance(event, (WorkerRescued, WorkerRenewed))]


@pytest.fixture
def lasting(settings: Settings, servers: TestServers) -> Iterator[Settings]:
    """The settings of a worker with backends that outlast its transactions, also where a pooler stands between."""
    if settings.database.pooler is None:
        yield settings
        return
    with a_pooler(servers.admin_url, keeps_backends=True) as pooled:
        url = pooled.set(database=make_url(str(settings.database.url)).database)
        yield _with_database(settings, url.render_as_string(hide_password=False))


async def test_a_worker_whose_backends_are_all_ended_goes_on(
    engine: AsyncEngine, sessions: Sessions, lasting: Settings
) -> None:
    async with a_worker(lasting, jobs.registry()):
        await jobs.enqueue_all(sessions, *(jobs.note.call(f"{n}") for n in range(5)))
        await until(lambda: _succeeded(engine, 5), "jobs have run")

        ended = await _end_all_backends(engine)
        waiting = await jobs.enqueue_all(sessions, *(jobs.note.call(f"then {n}") for n in range(20)))
        await until(lambda: _all_are(engine, waiting, "succeeded"), "jobs go on")

    assert ended >= (3 if lasting.database.pooler is None else 1)  # a pooler has as many as were busy at once
    assert len(await jobs.effects(engine)) == 25
    assert {(found.failures, found.crashes) for found in [await row(engine, job) for job in waiting]} == {(0, 0)}


async def test_a_restart_of_the_connections_under_load_leaves_one_effect_of_each_job(
    engine: AsyncEngine, sessions: Sessions, lasting: Settings
) -> None:
    words = sorted(f"{n:03}" for n in range(150))
    async with a_worker(lasting, jobs.registry()):
        await jobs.enqueue_all(sessions, *(jobs.note.call(word) for word in words))
        for done in (20, 60, 100):
            await until(lambda done=done: _at_least(engine, done), "some are done")  # type: ignore[misc]
            await _end_all_backends(engine)
        await until(lambda: _succeeded(engine, 150), "all are done")

    assert await jobs.effects(engine) == words


async def test_a_worker_that_cannot_start_leaves_nothing_behind(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("no publisher")

    monkeypatch.setattr("worker.resources.Publisher", fail)
    worker = Worker(settings, registry=jobs.registry(), handle_signals=False)
    with pytest.raises(RuntimeError, match="no publisher"):
        await worker.main()
    await worker.close()

    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM exarq.worker"))).scalar() == 0


async def test_an_error_inside_the_pump_stops_everything_in_order(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_args: Any) -> None:
        raise RuntimeError("pump")

    monkeypatch.setattr("worker.flow.pump.Pump.until_stopped", fail)
    monkeypatch.setattr("worker.flow.pump.Pump.finish", fail)
    worker = Worker(settings, registry=jobs.registry(), handle_signals=False)
    with pytest.raises(RuntimeError, match="pump"):
        await worker.main()
    await worker.close()

    assert await workers(engine) == []


async def test_a_worker_process_says_what_is_wrong_when_postgresql_is_away(
    engine: AsyncEngine, settings: Settings, tmp_path: Path
) -> None:
    address = f"postgresql://postgres@127.0.0.1:1/{uuid4().hex}"
    async with worker_process(settings, engine, registered=False, database_url=address) as worker:
        assert await worker.ended(120) == 1

        assert "PostgreSQL does not answer at" in worker.output


def _with_redis(settings: Settings, url: str) -> Settings:
    return settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": url})})


def _with_database(settings: Settings, url: str) -> Settings:
    return settings.model_copy(update={"database": settings.database.model_copy(update={"url": url})})


async def _end_all_backends(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'exarq %'"
        found = await connection.execute(text(query + " AND datname = current_database()"))
        return len(found.all())


async def _in(engine: AsyncEngine, seconds: float) -> Any:
    async with engine.connect() as connection:
        query = text("SELECT clock_timestamp() + make_interval(secs => :seconds)")
        return (await connection.execute(query, {"seconds": seconds})).scalar_one()


async def _effects_are(engine: AsyncEngine, wanted: list[str]) -> bool:
    return await jobs.effects(engine) == wanted


async def _succeeded(engine: AsyncEngine, count: int) -> bool:
    return await jobs.states(engine) == {"succeeded": count}


async def _at_least(engine: AsyncEngine, count: int) -> bool:
    return (await jobs.states(engine)).get("succeeded", 0) >= count


async def _is(engine: AsyncEngine, job: Any, wanted: str) -> bool:
    return await state(engine, job) == wanted


async def _all_are(engine: AsyncEngine, found: list[Any], wanted: str) -> bool:
    return {await state(engine, job) for job in found} == {wanted}
