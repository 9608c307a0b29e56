"""The processes under test: workers and producers that are started, killed, stopped, and started again."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from tests.chaos import jobs
from tests.chaos.checker import Excuse, Offence
from tests.chaos.evidence import EPOCH, epoch
from tests.chaos.processes import PRODUCER, SYNC_PRODUCER, WORKER, Process, environment

AWAY: Final = (OSError, DBAPIError, RedisError)
"""What a server raises that is broken just now."""


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


@dataclass(slots=True, kw_only=True)
class Fleet:
    """The workers and producers of a run, when their silence was our doing, and what they did wrong."""

    folder: Path
    pace: Pace
    rng: random.Random
    addresses: dict[str, str]
    twin: str | None = None
    variables: dict[str, object] = field(default_factory=dict)
    workers: list[Process] = field(default_factory=list)
    producers: list[Process] = field(default_factory=list)
    former: list[Process] = field(default_factory=list)
    excuses: list[Excuse] = field(default_factory=list)
    poisoned: set[UUID] = field(default_factory=set)  # workers that died of a job
    exits: list[str] = field(default_factory=list)  # workers that ended although nobody had asked or killed them
    blows: list[tuple[UUID, float]] = field(default_factory=list)  # when a worker was killed or frozen, by its id
    offences: list[Offence] = field(default_factory=list)
    _started: int = 0

    def start_worker(self, *, program: bool = False, wanted: bool = True, **more: Any) -> Process:
        """Start one more worker; as a program of its own where what is preloaded into it matters."""
        process = self._process("worker")
        process.wanted = wanted
        variables = self._of_a_worker(process, "tests.chaos.jobs", **more)
        if program:
            process.start_program(variables)
        else:
            process.start(WORKER, variables)
        self.workers.append(process)
        return process

    def start_parent(self, processes: int) -> Process:
        """Start `exarq run --processes N`, which nobody starts anew; its processes tell of themselves in files of their own."""
        parent = self._process("parent")
        parent.wanted = False
        parent.start_program(self._of_a_worker(parent, "tests.chaos.below_a_parent", processes=processes), "parent")
        self.former.append(parent)
        return parent

    def start_producer(self, *, sync: bool = False) -> Process:
        """Start one more producer; a sync one is a classic `Session` on psycopg."""
        process = self._process("sync_producer" if sync else "producer")
        process.start(
            SYNC_PRODUCER if sync else PRODUCER,
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

    def stalls(self) -> list[Excuse]:
        """A worker that the machine gave no time for half a lease may be rescued a little later."""
        return [
            Excuse(UUID(line["worker"]), line["at"] - line["seconds"], line["at"] + 2 * self.pace.lease)
            for process in [*self.workers, *self.former]
            for line in process.noted("stalled")
            if line["seconds"] > self.pace.lease / 2 and line["worker"]
        ]

    def _of_a_worker(self, process: Process, module: str, **more: object) -> dict[str, str]:
        processes = {"exarq_worker_processes": more.pop("processes")} if "processes" in more else {}
        return environment(
            exarq_settings=self._empty_file("settings.toml"),
            exarq_database_url=self.addresses["database"],
            exarq_redis_url=self.addresses["redis"],
            exarq_jobs_modules=module,
            exarq_log_level="warning",
            **self.pace.settings,
            **self.variables,
            **processes,
            chaos_evidence=process.evidence,
            **{EPOCH: epoch()},
            chaos_twin=self.twin or "",
            **more,
        )

    def _process(self, kind: str) -> Process:
        self._started += 1
        return Process(f"{kind}-{self._started}", self.folder)

    def _empty_file(self, name: str) -> Path:
        path = self.folder / name
        path.touch()
        return path
