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
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from tests.chaos import business, jobs, looks
from tests.chaos.checker import Excuse, Findings, Offence, check
from tests.chaos.evidence import EPOCH, Evidence, epoch
from tests.chaos.processes import PRODUCER, WORKER, Process, environment
from tests.chaos.servers import PrivatePostgres, PrivateRedis, private_servers
from tests.proxy import Proxy, postgres_proxy, redis_proxy
from worker.broker.connection import connect
from worker.db import migrate
from worker.flow.enqueue import Call, enqueue_many
from worker.flow.publish import Publisher

AWAY: Final = (OSError, DBAPIError, RedisError)
"""What a server raises that is broken just now."""

OBSERVER: Final = "chaos stage"
"""The application name of the connections that look and place jobs, past all proxies."""

WORKERS: Final = 3
PRODUCERS: Final = 2
MIX: Final[dict[str, float]] = {
    "noop": 30,
    "too_late": 1,
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
MOST_WAITING: Final = 2_000


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a run goes: every time is a share of the lease; ten seconds are the defaults that users have."""

    lease: float = 10.0

    @property
    def grace(self) -> float:
        """How long a stop leaves what runs, in seconds."""
        return self.lease * 2.5

    @property
    def settings(self) -> dict[str, object]:
        """The variables of a worker at this pace."""
        lease = self.lease
        return {
            "exarq_worker_lease": lease,
            "exarq_worker_beat": lease * 0.2,
            "exarq_worker_sweep": lease * 0.3,
            "exarq_worker_grace": self.grace,
            "exarq_jobs_timeout": lease * 8,
            "exarq_jobs_first_wait": lease * 0.05,
            "exarq_jobs_longest_wait": lease * 0.3,
        }


@dataclass(slots=True)
class Stage:
    """Everything under test, and the ways to look at it and to harm it."""

    folder: Path
    pace: Pace
    rng: random.Random
    say: Callable[[str], None]
    postgres: PrivatePostgres
    redis_server: PrivateRedis
    to_postgres: Proxy
    to_redis: Proxy
    addresses: dict[str, str]
    engine: AsyncEngine
    redis: ArqRedis
    publisher: Publisher
    evidence: Evidence
    twin: str | None = None
    mix: dict[str, float] = field(default_factory=lambda: dict(MIX))
    rate: float = 0.0
    workers: list[Process] = field(default_factory=list)
    producers: list[Process] = field(default_factory=list)
    former: list[Process] = field(default_factory=list)
    excuses: list[Excuse] = field(default_factory=list)
    poisoned: set[UUID] = field(default_factory=set)  # workers that died of a job
    returns: list[float] = field(default_factory=list)  # when PostgreSQL, which was away, could be reached again
    exits: list[str] = field(default_factory=list)  # workers that ended although nobody had asked or killed them
    variables: dict[str, object] = field(default_factory=dict)
    blows: list[tuple[UUID, float]] = field(default_factory=list)  # when a worker was killed or frozen, by its id
    calm: bool = False  # nothing is being broken, and what was broken has had time to heal
    offences: list[Offence] = field(default_factory=list)
    out_of_step: list[tuple[str, str]] = field(default_factory=list)
    looked: int = 0  # how often the running system was looked at
    evicted: set[str] = field(default_factory=set)  # ids whose hint was taken out of Redis
    _started: int = 0

    # ── workers and producers ────────────────────────────────────────────────────────────────────────────────────────

    def start_worker(self, *, program: bool = False, wanted: bool = True, **more: Any) -> Process:
        """Start one more worker; as a program of its own where what is preloaded into it matters."""
        process = self._process("worker")
        process.wanted = wanted
        variables = environment(
            exarq_settings=self._empty_file("settings.toml"),
            exarq_database_url=self.addresses["database"],
            exarq_redis_url=self.addresses["redis"],
            exarq_jobs_modules="tests.chaos.jobs",
            exarq_log_level="warning",
            **self.pace.settings,
            **self.variables,
            chaos_evidence=process.evidence,
            **{EPOCH: epoch()},
            chaos_twin=self.twin or "",
            **more,
        )
        if program:
            process.start_program(variables)
        else:
            process.start(WORKER, variables)
        self.workers.append(process)
        return process

    def start_producer(self) -> Process:
        """Start one more producer."""
        process = self._process("producer")
        process.start(
            PRODUCER,
            environment(
                exarq_settings=self._empty_file("settings.toml"),
                chaos_database=self.addresses["database"],
                chaos_redis=self.addresses["redis"],
                chaos_evidence=process.evidence,
                chaos_control=self.folder / "control.json",
                **{EPOCH: epoch()},
                chaos_seed=self.rng.random(),
                chaos_twin=self.twin or "",
            ),
        )
        self.producers.append(process)
        return process

    async def begun(self, *processes: Process, limit: float = 60.0) -> None:
        """Return when these workers have begun to work."""
        await self.until(
            lambda: all(process.worker_id or not process.runs for process in processes), "the workers begin", limit
        )

    def any_worker(self) -> Process:
        """One of the workers that run."""
        return self.rng.choice([process for process in self.workers if process.runs and process.worker_id])

    def back(self) -> None:
        """PostgreSQL was away and can be reached again from now on."""
        self.returns.append(time.time())

    def excuse(self, process: Process) -> None:
        """Its silence from now on is our doing: who rescues its jobs is right."""
        if process.worker_id:
            self.excuses.append(Excuse(process.worker_id, time.time()))

    def excuse_all(self) -> None:
        """The silence of any worker is our doing."""
        for process in self.workers:
            self.excuse(process)

    def end_excuses(self) -> None:
        """From two leases on, a worker that still runs has no excuse any more."""
        alive = {process.worker_id for process in self.workers if process.runs}
        for excuse in self.excuses:
            if excuse.worker_id in alive:
                excuse.until = min(excuse.until, time.time() + 2 * self.pace.lease)

    def strike(self, process: Process, number: signal.Signals) -> None:
        """Kill it or freeze it."""
        self.excuse(process)
        if process.worker_id:
            self.blows.append((process.worker_id, time.time()))
        process.send(number)

    async def kill(self, process: Process) -> None:
        """End a worker as a crash does."""
        process.wanted = False
        self.strike(process, signal.SIGKILL)
        await process.ended(10)
        self.leave(process)

    async def stop(self, process: Process, limit: float | None = None) -> int | None:
        """End a worker in order; its exit code."""
        process.wanted = False
        process.send(signal.SIGTERM)
        code = await process.ended(limit or self.pace.grace + 15)
        if code is None:
            self.offences.append(Offence("stops_in_order", process.name, "still ran long after its grace"))
            await self.kill(process)
        elif code != 0:
            self.offences.append(Offence("stops_in_order", process.name, f"exit code {code}"))
        self.leave(process)
        return code

    def leave(self, process: Process) -> None:
        """It has ended, and is no longer one of the workers; who finds its row finds nobody."""
        if process in self.workers:
            self.excuse(process)
            self.workers.remove(process)
            self.former.append(process)

    async def supervise(self) -> None:
        """Start a worker anew that ended although nobody wanted it to, as any container's supervisor does."""
        while True:
            for process in list(self.workers):
                if process.runs:
                    continue
                if process.worker_id:
                    self.blows.append((process.worker_id, time.time()))
                    if process.code == jobs.POISONED:
                        self.poisoned.add(process.worker_id)
                self.leave(process)
                if process.wanted:
                    if process.code != jobs.POISONED:
                        self._ended_unasked(process)
                    self.start_worker()
            for process in self.producers:
                assert process.runs, f"{process.name} ended:\n{process.output.read_text()[-3000:]}"
            await asyncio.sleep(0.1)

    def _ended_unasked(self, process: Process) -> None:
        said = f"exit code {process.code}"
        self.exits.append(f"{process.name}: {said}")
        if process.worker_id:  # else it could not start, as while PostgreSQL is away
            last = process.output.read_text(errors="replace").strip().splitlines()[-1:]
            self.offences.append(Offence("workers_live", process.name, f"{said}: {''.join(last)[-300:]}"))

    # ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def load(self, rate: float, mix: dict[str, float] | None = None) -> None:
        """From now on the producers place so many jobs a second, in this mix."""
        self.rate = rate
        if mix is not None:
            self.mix = mix
        self._tell_producers(rate)

    def _tell_producers(self, rate: float) -> None:
        told = self.folder / "control.json.new"
        told.write_text(json.dumps({"rate": rate / max(1, len(self.producers)), "mix": self.mix}))
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

    async def until(self, condition: Callable[[], Any], what: str, limit: float = 60.0) -> Any:
        """Wait until the condition holds; fail after `limit` seconds."""
        ends = time.monotonic() + limit
        while True:
            found: Any = None
            with suppress(*AWAY):  # a server may be what is broken just now
                found = condition()
                if asyncio.iscoroutine(found):
                    found = await found
            if found:
                return found
            if time.monotonic() > ends:
                raise TimeoutError(f"waited {limit:g} s in vain: {what}")
            await asyncio.sleep(0.05)

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
        await self.quiet(patience)
        self.offences += await looks.idle_in_transaction(self.engine)
        self.offences += await looks.left_running(self.engine)
        await asyncio.gather(*(self.stop(process) for process in list(self.workers)))
        self.offences += await looks.orphan_keys(self.engine, self.redis, self.evicted)
        if not self.looked:
            self.offences.append(Offence("looked", "the running system", "no look at it succeeded"))
        excuses = [*self.excuses, *self._stalls()]
        found = await check(
            self.engine, self.folder, excuses=excuses, poisoned=self.poisoned, out_of_step=self.out_of_step
        )
        found.offences += self.offences
        return found

    def _stalls(self) -> list[Excuse]:
        """A worker that the machine gave no time for half a lease may be rescued a little later."""
        return [
            Excuse(UUID(line["worker"]), line["at"] - line["seconds"], line["at"] + 2 * self.pace.lease)
            for process in [*self.workers, *self.former]
            for line in process.noted("stalled")
            if line["seconds"] > self.pace.lease / 2 and line["worker"]
        ]

    def _process(self, kind: str) -> Process:
        self._started += 1
        return Process(f"{kind}-{self._started}", self.folder)

    def _empty_file(self, name: str) -> Path:
        path = self.folder / name
        path.touch()
        return path


@asynccontextmanager
async def a_stage(
    folder: Path,
    *,
    pace: Pace,
    seed: str,
    say: Callable[[str], None] = lambda _: None,
    workers: int = WORKERS,
    producers: int = PRODUCERS,
    twin: str | None = None,
    **worker_variables: object,
) -> AsyncIterator[Stage]:
    """Servers, workers and producers that have begun, watched and supervised while the block lasts."""
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(private_servers())
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
        await migrate.upgrade(engine)
        await business.create_tables(engine)
        stage = Stage(
            folder, pace, random.Random(seed), say, postgres, redis_server, to_postgres, to_redis,
            {"database": database, "redis": redis_url}, engine, redis, publisher, Evidence(folder / "stage.jsonl", epoch()),
            twin, variables=worker_variables,
        )  # fmt: skip
        stage.load(0)
        try:
            for _ in range(workers):
                stage.start_worker()
            for _ in range(producers):
                stage.start_producer()
            await stage.begun(*stage.workers)
            async with _beside(stage.supervise(), stage.hold_back(), stage.watch()):
                yield stage
        finally:
            for process in [*stage.workers, *stage.producers, *stage.former]:
                process.send(signal.SIGKILL)
                await process.ended(10)


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
