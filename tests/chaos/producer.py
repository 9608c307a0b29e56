"""A producer process: an ordinary service that enqueues in its own transactions and notes outside what it committed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import arq
from arq.connections import ArqRedis, RedisSettings
from arq.constants import result_key_prefix
from arq.jobs import Job
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from tests.chaos import jobs
from tests.chaos.calls import KEYS, PLAIN, a_call, keyed_calls
from tests.chaos.evidence import Evidence
from tests.chaos.worker import FILE, die_with_parent, install_twin
from worker.broker.connection import UNREACHABLE, connect
from worker.broker.keys import PAYLOAD_PREFIX
from worker.core.states import JobState
from worker.db.failures import is_transient
from worker.flow.cancel import cancel
from worker.flow.enqueue import enqueue, enqueue_many
from worker.flow.handle import Handle, handle_of
from worker.flow.publish import Publisher
from worker.flow.retry import retry

CONTROL: Final = "CHAOS_CONTROL"
SEED: Final = "CHAOS_SEED"
DATABASE: Final = "CHAOS_DATABASE"
REDIS: Final = "CHAOS_REDIS"
_PLAIN_IDS: Final = 10
_PLAIN_PATIENCE: Final = 5.0
_AT_ONCE: Final = 4
_SAID: Final = (
    "exarq.enqueue(:name, CAST(:args AS jsonb), run_at => clock_timestamp() + :delay, priority => :priority"
    ", expires_at => clock_timestamp() + :delay + CAST(:expires AS interval)"
)
_BY_SQL: Final = text(f"SELECT {_SAID})")
_KEYED_BY_SQL: Final = text(f"SELECT {_SAID}, key => :key, unique_for => :unique_for)")
_OF_THIS_TRANSACTION: Final = text("SELECT xmin = CAST(pg_current_xact_id() AS xid) FROM exarq.job WHERE id = :id")
_PLACED: Final = text("INSERT INTO placed (job_id) SELECT unnest(CAST(:jobs AS uuid[]))")


class _Stock:
    """ARQ's own pool, made when it is first needed."""

    def __init__(self) -> None:
        self._pool: ArqRedis | None = None

    async def pool(self) -> ArqRedis:
        if self._pool is None:
            self._pool = await arq.create_pool(replace(RedisSettings.from_dsn(os.environ[REDIS]), conn_retries=0))
        return self._pool

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.aclose()


class Producer:
    """Enqueues at the rate and in the mix that the control file says, until told to stop."""

    def __init__(self, engine: AsyncEngine, redis: ArqRedis, evidence: Evidence, control: Path, seed: str) -> None:
        self._publisher = Publisher(redis, lease=timedelta(seconds=10))
        self._sessions = async_sessionmaker(engine, expire_on_commit=False, info=self._publisher.info)
        self._redis = redis
        self._stock = _Stock()
        self._evidence = evidence
        self._control = control
        self._rng = random.Random(seed)
        self._rate = 0.0
        self._mix: dict[str, float] = {}
        self._waits = 0.0
        self._stop = asyncio.Event()
        self._last: list[UUID] = []  # placed by this producer
        self._waiting: list[asyncio.Task[None]] = []  # for results

    async def run(self) -> None:
        """Place jobs until told to stop."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read_control())
            for _ in range(_AT_ONCE):
                tasks.create_task(self._place_until_stopped())
        await self._publisher.close()  # and end whoever waits still
        await asyncio.gather(*self._waiting)
        await self._stock.close()

    async def _read_control(self) -> None:
        while not self._stop.is_set():
            with suppress(ValueError, OSError):  # read in the middle of its replacement
                told = json.loads(self._control.read_text())
                self._rate, self._mix, self._waits = told["rate"], told["mix"], told["waits"]
            await asyncio.sleep(0.1)

    async def _place_until_stopped(self) -> None:
        while not self._stop.is_set():
            rate = self._rate
            if not rate:
                await asyncio.sleep(0.05)
                continue
            begun = time.monotonic()
            try:
                if self._rng.random() * sum(self._mix.values()) < self._mix.get(PLAIN, 0):
                    placed = 1
                    await self._enqueue_plain()
                else:
                    placed = await self._place_some()
                if self._last and self._rng.random() < 0.02:
                    await self._cancel_one()
            except Exception as error:
                if not (is_transient(error) or isinstance(error, UNREACHABLE)):
                    raise
                self._evidence.note("not enqueued", error=f"{type(error).__name__}: {error}"[:200])
                placed = 1
            self._evidence.note("enqueue took", seconds=round(time.monotonic() - begun, 4))
            wait = self._rng.uniform(0.5, 1.5) * placed * _AT_ONCE / rate - (time.monotonic() - begun)
            await asyncio.sleep(max(0.001, wait))

    async def _enqueue_plain(self) -> None:
        """Enqueue as code does that knows ARQ only, often under an id that has had a job before."""
        mark, arq_id = str(UUID(int=self._rng.getrandbits(128), version=4)), None
        pool = await self._stock.pool()
        if self._rng.random() < 0.6:
            arq_id = f"plain {self._rng.randint(1, _PLAIN_IDS)}"
            await pool.delete(result_key_prefix + arq_id)  # as if the hour were over for which ARQ keeps it
        self._evidence.note("plain intent", mark=mark)
        defer = self._rng.uniform(0.1, 1) if self._rng.random() < 0.2 else None
        enqueued = await pool.enqueue_job("chaos.plain", mark, _job_id=arq_id, _defer_by=defer)
        if enqueued is not None:
            self._evidence.note("plain enqueued", mark=mark)
            if arq_id is None and self._rng.random() < 0.2:
                self._waiting.append(asyncio.create_task(self._wait_for_plain(enqueued)))

    async def _wait_for_plain(self, enqueued: Job) -> None:
        """Note what ARQ's own client is told to have been returned."""
        try:
            result = await enqueued.result(timeout=_PLAIN_PATIENCE, poll_delay=0.1)
        except Exception as error:
            self._evidence.note("no result", job=enqueued.job_id, error=type(error).__name__)
        else:
            self._evidence.note("result", job=result["job"], attempt=result["attempt"])

    async def _cancel_one(self) -> None:
        """Ask that one of the last jobs ends, whatever it does now, and sometimes want it again at once."""
        job_id = self._rng.choice(self._last)
        self._evidence.note("asked", jobs=[job_id])
        async with self._sessions.begin() as session:
            ended = (await cancel(session, job_id)).state is JobState.CANCELLED
            if ended and self._rng.random() < 0.5:
                self._evidence.note("wanted again", jobs=[job_id])
                await retry(session, job_id)

    async def _place_some(self) -> int:
        """One transaction: usually one job, sometimes many, sometimes rolled back, whole or in part."""
        async with self._sessions() as session:
            dice = self._rng.random()
            if dice < 0.06:
                handles = await enqueue_many(
                    session, [a_call(self._rng, self._mix) for _ in range(self._rng.randint(5, 20))]
                )
                kept = [handle.id for handle in handles]
            elif dice < 0.10:
                kept = [(await enqueue(session, "chaos.one")).id]
            elif dice < 0.18:
                kept = await self._keyed(session)
            elif dice < 0.26:
                kept = await self._by_sql(session)
            else:
                kept = [(await self._one(session)).id]
            undone = await self._undone_in_a_savepoint(session) if dice > 0.9 else []
            await session.execute(_PLACED, {"jobs": kept})
            if self._rng.random() < 0.1:
                await self._look_for_early_hints([*kept, *undone])
            if self._rng.random() < 0.1:
                await session.rollback()
                self._evidence.note("rolled back", jobs=[*kept, *undone])
                return len(kept)
            await self._commit(session, kept)
            if undone:
                self._evidence.note("rolled back", jobs=undone)
            return max(1, len(kept))

    async def _keyed(self, session: AsyncSession) -> list[UUID]:
        """Those that were there already are not of this transaction."""
        handles = await enqueue_many(session, keyed_calls(self._rng))
        return [handle.id for handle in handles if handle.happened == "created"]

    async def _by_sql(self, session: AsyncSession) -> list[UUID]:
        """As a service in another language does, which has no publisher; a job that had the key is not of this one."""
        call = a_call(self._rng, self._mix)
        given: dict[str, Any] = {"name": call.name, "args": call.args, "delay": call.delay, "priority": call.priority}
        given["expires"] = call.expires  # nobody but the caller knows what the definition says of it
        if keyed := self._rng.random() < 0.3:
            given |= {"name": jobs.one.name, "args": "{}", "expires": None, "key": str(self._rng.randint(1, KEYS))}
            given["unique_for"] = self._rng.choice(["until_started", "until_done"])
        job_id: UUID = (await session.execute(_KEYED_BY_SQL if keyed else _BY_SQL, given)).scalar_one()
        created = not keyed or (await session.execute(_OF_THIS_TRANSACTION, {"id": job_id})).scalar_one()
        return [job_id] if created else []

    async def _one(self, session: AsyncSession) -> Any:
        return (await enqueue_many(session, [a_call(self._rng, self._mix)]))[0]

    async def _undone_in_a_savepoint(self, session: AsyncSession) -> list[UUID]:
        savepoint = await session.begin_nested()
        undone = [(await self._one(session)).id]
        await session.execute(_PLACED, {"jobs": undone})
        await savepoint.rollback()
        return undone

    async def _commit(self, session: AsyncSession, kept: Sequence[UUID]) -> None:
        self._evidence.note("intent", jobs=kept)
        try:
            await session.commit()
        except BaseException:
            self._evidence.note("unknown", jobs=kept)
            raise
        self._evidence.note("committed", jobs=kept)
        self._last = [*self._last, *kept][-20:]
        if kept and self._rng.random() < self._waits:
            self._waiting.append(asyncio.create_task(self._wait_for(handle_of(session, kept[0]))))

    async def _wait_for(self, handle: Handle[Any]) -> None:
        """Note what it is told to have returned."""
        try:
            result = await handle.result()
        except Exception as error:  # it did not succeed, a server is away, or this producer stops
            self._evidence.note("no result", job=handle.id, error=type(error).__name__)
        else:
            self._evidence.note("result", job=handle.id, attempt=result["attempt"])

    async def _look_for_early_hints(self, ids: Sequence[UUID]) -> None:
        """Nothing may be in Redis yet: the transaction is open, and may still roll back."""
        await self._publisher.flush()
        with suppress(OSError, TimeoutError, Exception):
            found = await self._redis.mget([f"{PAYLOAD_PREFIX}{job_id}" for job_id in ids])
            early = [job_id for job_id, payload in zip(ids, found, strict=True) if payload is not None]
            if early:
                self._evidence.note("early", jobs=early)


async def _main() -> None:
    engine = create_async_engine(
        os.environ[DATABASE], pool_size=_AT_ONCE, connect_args={"timeout": 5, "command_timeout": 5}
    )
    redis = connect(os.environ[REDIS], timeout=timedelta(seconds=3))
    evidence = Evidence.of_this_process(FILE)
    try:
        await Producer(engine, redis, evidence, Path(os.environ[CONTROL]), os.environ[SEED]).run()
    finally:
        await redis.aclose()
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                await engine.dispose()


def main() -> None:
    """Produce until told to stop."""
    die_with_parent()
    install_twin()
    asyncio.run(_main())
