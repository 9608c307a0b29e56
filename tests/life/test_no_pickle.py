"""Nothing but plain data is ever unpickled: a pickle in Redis, where others may write, would run what it says."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from arq.connections import ArqRedis
from arq.constants import result_key_prefix
from arq.jobs import DeserializationError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

import worker
from tests.life import jobs_for_tests as jobs
from tests.support import a_worker, until
from worker.broker.keys import PAYLOAD_PREFIX, queue_key, wake_key, workers_channel
from worker.core.context import JobContext
from worker.flow.job import JobFunction
from worker.settings import Settings

LOADERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "multiprocessing"}

exploded: list[str] = []


def explode(where: str) -> None:
    exploded.append(where)


class Bomb:
    """Tells where it was unpickled."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return explode, (self.where,)


def bomb(where: str) -> bytes:
    return pickle.dumps({"t": None, "f": "f", "a": (), "k": {}, "et": 1, "x": Bomb(where)})


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_one_module_alone_imports_what_can_unpickle() -> None:
    files = list(Path(worker.__file__).parent.rglob("*.py"))

    assert len(files) > 80
    assert [file.name for file in files if imported(file) & LOADERS] == ["payloads.py"]


async def looks_around(ctx: JobContext) -> None:
    """All that ARQ's own client in the context can be asked for."""
    redis: ArqRedis = ctx["redis"]
    for ask in (redis.queued_jobs, redis.all_job_results):
        with pytest.raises((DeserializationError, UnicodeDecodeError)):  # the queue's members are garbage too
            await ask()
    enqueued = await redis.enqueue_job("plain", _job_id="another")
    assert enqueued is not None
    for prefix in (PAYLOAD_PREFIX, result_key_prefix):
        await redis.set(f"{prefix}another", bomb("info"))
    for look in (enqueued.info, enqueued.result_info):
        with pytest.raises(DeserializationError):
            await look()


@pytest.mark.leaves_hints
async def test_a_pickle_anywhere_in_redis_is_never_loaded(
    engine: AsyncEngine, sessions: async_sessionmaker[AsyncSession], settings: Settings, redis: ArqRedis
) -> None:
    looking = JobFunction(looks_around, name="tests.looks_around", max_attempts=1)
    registry = jobs.registry()
    registry.register(looking)
    await jobs.make_effects(engine)
    first, second = await jobs.enqueue_all(sessions, jobs.note.call("ours"), looking.call())
    async with engine.connect() as connection:
        installation = (await connection.execute(text("SELECT id FROM exarq.installation"))).scalar_one()
    assert pickle.loads(bomb("here"))["x"] is None
    assert exploded.pop() == "here", "the bomb works"

    for job_id in (str(first), str(second), str(uuid4()), uuid4().hex, "plain"):
        await redis.zadd(queue_key("default"), {job_id: 1})
        await redis.set(PAYLOAD_PREFIX + job_id, bomb("payload"))
        await redis.set(result_key_prefix + job_id, bomb("result"))
    await redis.zadd(queue_key("default"), {bomb("member"): 1})
    await redis.lpush(wake_key("default"), bomb("wake"))  # type: ignore[misc]  # redis-py 5 types it as sync or async
    async with a_worker(settings, registry):
        await redis.publish(workers_channel(installation), bomb("cancel"))
        await until(lambda: _all_succeeded(engine), "both jobs run")
        await until(lambda: _all_kept(engine), "what no worker reads is kept")

    assert exploded == []


async def _all_succeeded(engine: AsyncEngine) -> bool:
    states = {row.name: (row.state, row.error) for row in await jobs.rows(engine, "name, state, error")}
    states.pop("arq.unreadable", None)
    assert not any(state == "failed" for state, _ in states.values()), states
    return [state for state, _ in states.values()] == ["succeeded"] * 2


async def _all_kept(engine: AsyncEngine) -> bool:
    """The bombs under ids that are not ours: one a UUID of nobody's, one of ARQ's, one that the job has lit itself."""
    found = await jobs.rows(engine, "arq_id, error")
    return {"plain", "another"} <= {row.arq_id for row in found if "only plain data is read" in (row.error or "")}
