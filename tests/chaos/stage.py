"""The stage of a chaos run: servers of its own behind proxies, workers, producers, and what is looked at meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from tests.chaos import business, looks
from tests.chaos.checker import Findings, Offence, check
from tests.chaos.evidence import Evidence, epoch
from tests.chaos.fleet import AWAY, Fleet, Pace
from tests.chaos.servers import PrivatePostgres, PrivateRedis, private_postgres, private_servers
from tests.proxy import Proxy, postgres_proxy, redis_proxy
from worker.broker.connection import connect
from worker.db import migrate
from worker.flow.enqueue import Call, enqueue_many
from worker.flow.publish import Publisher
from worker.flow.schedules import list_schedules, pause_schedule

OBSERVER: Final = "chaos stage"
"""The application name of the connections that look and place jobs, past all proxies."""

WORKERS: Final = 3
PRODUCERS: Final = 2
SYNC_PRODUCERS: Final = 1
MIX: Final[dict[str, float]] = {
    "noop": 30,
    "too_late": 1,
    "plain": 6,
    "one": 30,
    "several": 10,
    "commits": 8,
    "undoes": 4,
    "legacy_commits": 6,
    "legacy_goes_on": 4,
    "slow:5": 1.5,
    "late:5": 1,
    "naps:5": 1,
    "flaky": 4,
    "snoozes": 2,
    "reads": 5,
    "isolated": 3,
    "steps:3": 2,
    "fails": 2,
    "shares": 1,
    "gives_up": 2,
    "blocks:asleep:0.2": 0.3,
    "blocks:python:0.2": 0.3,
    "blocks:c:0.2": 0.3,
}
WAITS: Final = 0.05
"""Of so many commits a producer waits for a result."""
MOST_WAITING: Final = 2_000


@dataclass(slots=True, kw_only=True)
class Stage(Fleet):
    """Everything under test, and the ways to look at it and to harm it."""

    say: Callable[[str], None]
    postgres: PrivatePostgres
    redis_server: PrivateRedis
    to_postgres: Proxy
    to_redis: Proxy
    engine: AsyncEngine
    redis: ArqRedis
    publisher: Publisher
    evidence: Evidence
    mix: dict[str, float] = field(default_factory=lambda: dict(MIX))
    rate: float = 0.0
    waits: float = WAITS
    returns: list[float] = field(default_factory=list)  # when PostgreSQL, which was away, could be reached again
    calm: bool = False  # nothing is being broken, and what was broken has had time to heal
    out_of_step: list[tuple[str, str]] = field(default_factory=list)
    looked: int = 0  # how often the running system was looked at
    wipes: list[float] = field(default_factory=list)  # when Redis had lost something
    evicted: set[str] = field(default_factory=set)  # ids whose hint was taken out of Redis

    def back(self) -> None:
        """PostgreSQL was away and can be reached again from now on."""
        self.returns.append(time.time())

    def wiped(self) -> None:
        """Redis has lost something; a plain ARQ job that nobody had adopted may be gone."""
        self.wipes.append(time.time())

    # ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def load(self, rate: float, mix: dict[str, float] | None = None, *, waits: float = WAITS) -> None:
        """From now on the producers place so many jobs a second, in this mix, and wait for this share of results."""
        self.rate, self.waits = rate, waits
        if mix is not None:
            self.mix = mix
        self._tell_producers(rate)

    def _tell_producers(self, rate: float) -> None:
        told = self.folder / "control.json.new"
        told.write_text(json.dumps({"rate": rate / max(1, len(self.producers)), "mix": self.mix, "waits": self.waits}))
        told.replace(self.folder / "control.json")

    async def place(self, *calls: Call) -> list[UUID]:
        """Enqueue these ourselves, past the proxies, in one transaction with their business rows."""
        sessions = async_sessionmaker(self.engine, expire_on_commit=False, info=self.publisher.info)
        async with sessions() as session:
            ids = [handle.id for handle in await enqueue_many(session, calls)]
            await session.execute(looks.PLACE, {"jobs": ids})
            self.evidence.note("intent", jobs=ids)
            await session.commit()
            self.evidence.note("committed", jobs=ids)
        await self.publisher.flush()
        return ids

    def asked_to_cancel(self, job_id: UUID) -> None:
        """Note that somebody is about to cancel this job, so that it may end so."""
        self.evidence.note("asked", jobs=[job_id])

    async def hold_back(self) -> None:
        """Keep the producers from running away from the workers."""
        held = False
        while True:
            with suppress(*AWAY):
                waiting = await looks.unfinished(self.engine)
                if (waiting > MOST_WAITING) != held:
                    held = not held
                    self._tell_producers(0 if held else self.rate)
            await asyncio.sleep(0.5)

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def watch(self) -> None:
        """Look at the running system: is any result visible without its effect, is a hint missing for no reason?"""
        since, before = 0, set[UUID]()
        while True:
            with suppress(*AWAY):
                since, found = await looks.out_of_step(self.engine, since)
                self.looked += 1
                self.out_of_step += found
                missing = await self._missing_hints() if self.calm else set()
                if self.calm:
                    self._note_missing(missing & before)
                before = missing
            await asyncio.sleep(0.25)

    async def healed(self, limit: float) -> None:
        """Return when Redis knows every job that waits and is due soon; an offence if it does not in so many seconds."""
        ends = time.monotonic() + limit
        missing: set[UUID] = set()
        while time.monotonic() < ends:
            with suppress(*AWAY):
                missing = await self._missing_hints()
                if not missing:
                    return
            await asyncio.sleep(0.1)
        self._note_missing(missing)

    async def _missing_hints(self) -> set[UUID]:
        return set(await looks.missing_hints(self.engine, self.redis))

    def _note_missing(self, missing: Iterable[UUID]) -> None:
        why = "waits and is due, and Redis does not know it"
        self.offences += [Offence("hints_missing", str(job_id), why) for job_id in missing]

    async def quiet(self, patience: float | None = None) -> None:
        """Return when every job has ended and Redis is empty, or when nothing has moved for so long."""
        self.calm = False
        patience = patience or self.pace.lease * 10 + 15  # longer than a job may run
        last, moved_at = None, time.monotonic()
        ends = time.monotonic() + 20 * patience
        while time.monotonic() < ends:
            now = await looks.progress(self.engine, self.redis)
            if now.unfinished == 0 and now.hints == 0:
                return
            if now != last:
                last, moved_at = now, time.monotonic()
            if time.monotonic() - moved_at > patience:
                return
            await asyncio.sleep(0.1)

    async def finish(self, patience: float | None = None) -> Findings:
        """Let everything come to rest, stop all processes in order, and check."""
        producers, self.producers = self.producers, []
        self.former += producers
        for process in producers:
            process.send(signal.SIGTERM)
        for process in producers:
            await process.ended(15)
        await self._stop_the_clock()
        await self.quiet(patience)
        self.offences += await looks.idle_in_transaction(self.engine)
        self.offences += await looks.left_running(self.engine)
        await asyncio.gather(*(self.stop(process) for process in list(self.workers)))
        self.offences += await looks.orphan_keys(self.engine, self.redis, self.evicted)
        if not self.looked:
            self.offences.append(Offence("looked", "the running system", "no look at it succeeded"))
        excuses = [*self.excuses, *self.stalls()]
        found = await check(
            self.engine,
            self.folder,
            excuses=excuses,
            poisoned=self.poisoned,
            out_of_step=self.out_of_step,
            wipes=self.wipes,
        )
        found.offences += self.offences
        return found

    async def _stop_the_clock(self) -> None:
        async with AsyncSession(self.engine) as session, session.begin():
            for scheduled in await list_schedules(session):
                await pause_schedule(session, scheduled.name)


@asynccontextmanager
async def a_stage(
    folder: Path,
    *,
    pace: Pace,
    seed: str,
    say: Callable[[str], None] = lambda _: None,
    workers: int = WORKERS,
    producers: int = PRODUCERS,
    sync_producers: int = SYNC_PRODUCERS,
    twin: str | None = None,
    cluster: Path | None = None,
    **worker_variables: object,
) -> AsyncIterator[Stage]:
    """Servers, workers and producers that have begun, watched and supervised while the block lasts."""
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(private_servers(cluster))
        postgres, redis_server = servers.postgres, servers.redis
        to_postgres, database = await stack.enter_async_context(postgres_proxy(postgres.url))
        to_redis, redis_url = await stack.enter_async_context(redis_proxy(redis_server.url))
        named = {"server_settings": {"application_name": OBSERVER}}
        engine = create_async_engine(postgres.url, pool_pre_ping=True, pool_size=5, connect_args=named)
        stack.push_async_callback(engine.dispose)
        redis = connect(redis_server.url, timeout=timedelta(seconds=3))
        stack.push_async_callback(redis.aclose)
        publisher = Publisher(redis, lease=timedelta(seconds=pace.lease))
        stack.push_async_callback(publisher.close)
        if cluster is None:
            await _create_tables(engine)
        stage = Stage(
            folder=folder, pace=pace, rng=random.Random(seed), addresses={"database": database, "redis": redis_url},
            twin=twin, variables=worker_variables, say=say, postgres=postgres, redis_server=redis_server,
            to_postgres=to_postgres, to_redis=to_redis, engine=engine, redis=redis, publisher=publisher,
            evidence=Evidence(folder / "stage.jsonl", epoch()),
        )  # fmt: skip
        stage.load(0)
        try:
            for _ in range(workers):
                stage.start_worker()
            for number in range(producers + sync_producers):
                stage.start_producer(sync=number >= producers)
            await stage.begun(*stage.workers)
            async with _beside(stage.supervise(), stage.hold_back(), stage.watch()):
                yield stage
        finally:
            for process in [*stage.workers, *stage.producers, *stage.former]:
                process.send(signal.SIGKILL)
                await process.ended(10)


@asynccontextmanager
async def a_cluster() -> AsyncIterator[Path]:
    """A cluster for many stages to copy, with Exarq's tables and the business's; gone when the block ends."""
    async with private_postgres() as postgres:
        engine = create_async_engine(postgres.url)
        await _create_tables(engine)
        async with engine.begin() as connection:
            await connection.execute(text("CHECKPOINT"))  # so that no copy has anything to recover
        await engine.dispose()
        await postgres.end()
        yield postgres.data


async def _create_tables(engine: AsyncEngine) -> None:
    await migrate.upgrade(engine)
    await business.create_tables(engine)


@asynccontextmanager
async def _beside(*loops: Any) -> AsyncIterator[None]:
    """Run these while the block lasts; what one of them raises ends the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop) for loop in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
