"""`arq worker.process.WorkerSettings`, ARQ's own command in processes of its own, kept honest by SIGKILL and FLUSHALL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from arq.constants import in_progress_key_prefix
from arq.jobs import JobStatus
from arq.worker import Worker, func
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.arq_clients import a_stock_pool
from tests.chaos.servers import PrivateRedis, private_redis
from tests.life import jobs_for_tests as jobs
from tests.processes import _environment
from tests.support import until
from worker.arq_command import OneByOne
from worker.broker.connection import connect
from worker.broker.hints import Hint, due_at
from worker.broker.keys import PAYLOAD_PREFIX, queue_key
from worker.broker.scripts import publish
from worker.core.priority import DEFAULT_PRIORITY
from worker.db import transitions
from worker.db.ids import uuid7
from worker.flow.publish import Publisher
from worker.settings import Settings

pytestmark = pytest.mark.hasty
_ROOT = Path(__file__).parents[2]


@pytest.fixture
async def own_redis() -> AsyncIterator[PrivateRedis]:
    """A Redis of this test alone, which it may wipe."""
    async with private_redis() as redis:
        yield redis


@pytest.fixture
async def sessions(engine: AsyncEngine, own_redis: PrivateRedis) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    redis = connect(own_redis.url, timeout=timedelta(seconds=5))
    publisher = Publisher(redis, lease=timedelta(seconds=2), closes_redis=True)
    yield async_sessionmaker(engine, expire_on_commit=False, info=publisher.info)
    await publisher.close()


class ArqCommand:
    """ARQ's command, started as a person does."""

    def __init__(self, settings: Settings, redis_url: str, folder: Path, lines: Path, *options: str) -> None:
        self._log = folder / f"arq-{uuid7()}.log"
        environment = _environment(settings, lines, {"redis_url": redis_url})
        with self._log.open("wb") as log:
            command = [str(Path(sys.executable).with_name("arq")), "worker.process.WorkerSettings", *options]
            self._process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text()[-4000:]

    async def ended(self) -> int:
        code = await until(lambda: None if self._process.poll() is None else (self._process.poll(),), "it ends", 60)
        return int(code[0])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def arq_command(settings: Settings, redis: PrivateRedis, folder: Path, count: int = 1) -> Iterator[list[ArqCommand]]:
    started: list[ArqCommand] = []
    try:
        started += [ArqCommand(settings, redis.url, folder, folder / "lines") for _ in range(count)]
        yield started
    finally:
        for one in started:
            one.kill()


async def begun(engine: AsyncEngine, *commands: ArqCommand) -> None:
    def all_beat(pids: set[int]) -> bool:
        assert all(one._process.poll() is None for one in commands), "\n".join(one.output for one in commands)
        return {one.pid for one in commands} <= pids

    async def beating() -> bool:
        async with engine.connect() as connection:
            return all_beat(
                set((await connection.execute(text("SELECT pid FROM exarq.worker WHERE beat > 0"))).scalars())
            )

    await until(beating, "ARQ's workers beat", 120)


async def holder(engine: AsyncEngine, job_id: Any) -> int | None:
    """The process that runs the job."""
    query = "SELECT pid FROM exarq.worker AS w JOIN exarq.job AS j ON w.id = j.worker_id WHERE j.id = :id"
    async with engine.connect() as connection:
        return (await connection.execute(text(query), {"id": job_id})).scalar()


async def all_succeeded(engine: AsyncEngine, count: int) -> bool:
    return await jobs.states(engine) == {"succeeded": count}


async def test_a_killed_process_costs_no_job_and_repeats_no_effect(
    engine: AsyncEngine, sessions: Any, settings: Settings, own_redis: PrivateRedis, tmp_path: Path
) -> None:
    await jobs.make_effects(engine)
    words = [f"note {number:02}" for number in range(20)]
    with arq_command(settings, own_redis, tmp_path, 2) as commands:
        await begun(engine, *commands)
        (held,) = await jobs.enqueue_all(sessions, jobs.holding.call("held", 600.0))
        await jobs.enqueue_all(sessions, *(jobs.note.call(word) for word in words))
        await until(lambda: "began held 1" in jobs.lines(tmp_path / "lines"), "it runs", 60)
        pid = await holder(engine, held)
        next(one for one in commands if one.pid == pid).kill()
        await until(lambda: all_succeeded(engine, 21), "all have succeeded", 90)

    assert await jobs.effects(engine) == ["held 2", *words]


async def test_what_was_picked_by_a_process_that_died_before_it_claimed_runs_again_in_seconds(
    engine: AsyncEngine, sessions: Any, settings: Settings, own_redis: PrivateRedis, tmp_path: Path
) -> None:
    await jobs.make_effects(engine)
    (picked,) = await jobs.enqueue_all(sessions, jobs.note.call("picked"))
    async with aclosing(connect(own_redis.url, timeout=timedelta(seconds=5))) as redis:
        await redis.psetex(f"{in_progress_key_prefix}{picked}", 86_400_000, b"1")
    with arq_command(settings, own_redis, tmp_path) as commands:
        await begun(engine, *commands)
        await until(lambda: all_succeeded(engine, 1), "it has run", 20)


async def test_a_wipe_of_redis_costs_no_job_and_repeats_no_effect(
    engine: AsyncEngine, sessions: Any, settings: Settings, own_redis: PrivateRedis, tmp_path: Path
) -> None:
    await jobs.make_effects(engine)
    later = [jobs.note.options(delay=2).call(f"later {number:02}") for number in range(20)]
    with arq_command(settings, own_redis, tmp_path) as commands:
        await begun(engine, *commands)
        await jobs.enqueue_all(sessions, jobs.slow.call("slow", 3.0), *later)
        await until(lambda: "began slow" in jobs.lines(tmp_path / "lines"), "one runs", 60)
        await own_redis.flushall()
        await until(lambda: all_succeeded(engine, 21), "all have succeeded", 90)

    assert await jobs.effects(engine) == [f"later {number:02}" for number in range(20)] + ["slow"]
    assert jobs.lines(tmp_path / "lines").count("began slow") == 1


async def test_sigterm_lets_what_runs_end_and_the_worker_is_gone(
    engine: AsyncEngine, sessions: Any, settings: Settings, own_redis: PrivateRedis, tmp_path: Path
) -> None:
    await jobs.make_effects(engine)
    with arq_command(settings, own_redis, tmp_path) as (command,):
        await begun(engine, command)
        await jobs.enqueue_all(sessions, jobs.slow.call("ends", 0.8))
        await until(lambda: "began ends" in jobs.lines(tmp_path / "lines"), "it runs", 60)
        os.kill(command.pid, signal.SIGTERM)
        code = await command.ended()

    assert code == 0, command.output
    assert await jobs.effects(engine) == ["ends"]
    assert await jobs.states(engine) == {"succeeded": 1}
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM exarq.worker"))).scalar() == 0


async def test_what_plain_arq_code_enqueues_runs_there_too_and_what_is_not_ours_stays(
    engine: AsyncEngine, settings: Settings, own_redis: PrivateRedis, tmp_path: Path
) -> None:
    await jobs.make_effects(engine)
    with arq_command(settings, own_redis, tmp_path) as commands:
        await begun(engine, *commands)
        async with a_stock_pool(own_redis.url) as pool:
            job = await pool.enqueue_job("tests.note", "plain")
            refused = await pool.enqueue_job("tests.note", 7)
            theirs = Hint(uuid7(), "theirs", "default", due_at(-1.0), 1, uuid7(), DEFAULT_PRIORITY)
            async with aclosing(connect(own_redis.url, timeout=timedelta(seconds=5))) as redis:
                await publish(redis, [theirs], lease=timedelta(seconds=2))
            assert job is not None
            assert refused is not None
            await job.result(timeout=60, poll_delay=0.05)
            with pytest.raises(Exception, match="argument word"):
                await refused.result(timeout=60, poll_delay=0.05)
            assert await job.status() is JobStatus.complete
            await until(lambda: _is_put_off(pool, theirs), "another installation's is left where it is")

    assert await jobs.effects(engine) == ["plain"]


async def test_what_plain_arq_code_enqueues_stays_in_redis_while_postgresql_refuses_its_row(
    engine: AsyncEngine, settings: Settings, own_redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_connection: Any, _arrays: Any) -> Any:
        raise OSError("the connection is gone")

    of_this_test = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": own_redis.url})})
    one = OneByOne(of_this_test)
    async with a_stock_pool(own_redis.url) as pool:
        assert await pool.enqueue_job("tests.note", "plain", _job_id="plain")
        worker = Worker(
            functions=[func(one.run, name="tests.note")],
            redis_pool=pool,
            on_startup=one.startup,
            job_deserializer=one.read,
            burst=True,
            max_burst_jobs=1,
            handle_signals=False,
            keep_result=0,
        )
        monkeypatch.setattr(transitions, "adopt", refuse)
        await worker.main()
        await one.shutdown({})

        assert await pool.exists(f"{PAYLOAD_PREFIX}plain")
        assert await pool.zscore(queue_key("default"), "plain") is not None


async def _is_put_off(pool: Any, hint: Hint) -> bool:
    score = await pool.zscore(queue_key("default"), str(hint.job_id))
    seconds, _ = await pool.time()
    return score is not None and score > seconds * 1000
