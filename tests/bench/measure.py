"""One run of one workload by one system, measured from outside."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from tests.bench.processes import BenchError, Script, Workers
from tests.bench.servers import Counters, Servers
from tests.bench.tally import Begun
from tests.bench.workloads import Workload

_LOOK_EVERY: Final = 0.002
_FIRST_JOB_LIMIT: Final = 60.0
_RUN_LIMIT: Final = 180.0
_WARMING: Final = 20
_WRITING: Final = ("orm", "legacy")


@dataclass(frozen=True)
class Run:
    """What one run has shown; None where it does not apply."""

    jobs: int
    seconds: float | None = None
    cpu: float | None = None
    memory_mb: float | None = None
    cost: Counters | None = None
    latencies: list[float] = field(default_factory=list)
    by_hand: Run | None = None

    @property
    def rate(self) -> float | None:
        """Jobs a second."""
        return self.jobs / self.seconds if self.seconds else None


class Bench:
    """One system, ready to be measured.

    Args:
        servers: those that all share.
        script: the system.
        database_url: its database.

    """

    def __init__(self, servers: Servers, script: Script, database_url: str) -> None:
        self._servers = servers
        self._script = script
        self._database_url = database_url

    async def run(self, workload: Workload, concurrency: int, jobs: int) -> Run:
        """Measure once, from an empty queue on."""
        await self.prepare()
        return await self.measure(workload, concurrency, jobs)

    async def prepare(self) -> None:
        """Forget what was before."""
        await self._servers.reset(self._database_url)
        await self._script.ask("reset")

    async def enqueue(self, workload: Workload, jobs: int) -> None:
        """Fill the queue for a throughput run."""
        await self._script.ask("enqueue_many", workload=workload.job, jobs=jobs)

    async def started(self, processes: int) -> None:
        """Return once so many workers are there, where the system tells; with one, its first jobs do."""

    async def left(self) -> int:
        """How many jobs have not ended, once all have begun."""
        return int((await self._script.ask("left"))["left"])

    async def measure(self, workload: Workload, concurrency: int, jobs: int) -> Run:
        """Measure once, with what is there."""
        await self._servers.checkpoint()
        match workload.kind:
            case "throughput":
                return await self._throughput(workload, concurrency, jobs)
            case "latency":
                return await self._latency(workload, concurrency, jobs)
            case "enqueue":
                return await self._enqueue(workload, jobs)

    async def _throughput(self, workload: Workload, concurrency: int, jobs: int) -> Run:
        """From the first line of the first job until the store says that every job has ended; the queue was full."""
        await self.enqueue(workload, jobs)
        backends = await self._servers.backends(self._database_url)
        before = await self._counters(backends)
        async with self._script.workers(workload.job, concurrency, workload.processes) as workers:
            at_first = await _first_job(workers)
            await _all_begun(workers, jobs)
            while await self.left():  # noqa: ASYNC110 — a store sets no Event
                await asyncio.sleep(_LOOK_EVERY)
            ended = time.monotonic_ns()
            cpu, memory, begun = workers.cpu(), workers.memory_mb(), workers.begun()
        after = await self._counters(backends)
        if workload.job in _WRITING and (written := await self._servers.entries(self._database_url)) != jobs:
            raise BenchError(f"it says that {jobs:,} jobs have ended, and {written:,} have written their line")
        return Run(
            jobs=jobs,
            seconds=(ended - min(process.first_at for process in begun)) / 1e9,
            cpu=_cpu_between(at_first, begun, cpu),
            memory_mb=memory,
            cost=after.since(before),
        )

    async def _latency(self, workload: Workload, concurrency: int, jobs: int) -> Run:
        """Jobs for an idle worker, now and then one: until the first line of each."""
        async with self._script.workers(workload.job, concurrency, workload.processes) as workers:
            warming = _WARMING * workload.processes
            await self.started(workload.processes)
            await self._script.ask("latency", jobs=warming)
            await _all_begun(workers, warming)
            first = workers.latencies()
            await self._script.ask("latency", jobs=jobs)
            await _all_begun(workers, warming + jobs)
            latencies = _without(workers.latencies(), first)
            return Run(jobs=jobs, memory_mb=workers.memory_mb(), latencies=latencies)

    async def _enqueue(self, workload: Workload, jobs: int) -> Run:
        await self._script.ask("reopen")
        backends = await self._servers.backends(self._database_url)
        before = await self._counters(backends)
        took = await self._script.ask(workload.name, workload=workload.job, jobs=jobs)
        await self._script.ask("reopen")
        by_hand = "by_hand_seconds" in took
        cost = None if by_hand else (await self._counters(backends)).since(before)
        return Run(
            jobs=jobs,
            seconds=took["seconds"],
            cpu=took["cpu"],
            by_hand=Run(jobs=jobs, seconds=took["by_hand_seconds"], cpu=took["by_hand_cpu"]) if by_hand else None,
            cost=cost,
        )

    async def _counters(self, backends: int) -> Counters:
        return await self._servers.counters(self._database_url, backends=backends)


async def _first_job(workers: Workers) -> dict[int, float]:
    """Wait for the first job; what each process of the worker had used by then, as far as we can see."""
    ends = time.monotonic() + _FIRST_JOB_LIMIT
    while not workers.begun():
        if time.monotonic() > ends:
            raise BenchError(f"no job had begun after {_FIRST_JOB_LIMIT:g} s")
        await asyncio.sleep(_LOOK_EVERY)
    return workers.cpu()


async def _all_begun(workers: Workers, jobs: int) -> None:
    ends = time.monotonic() + _RUN_LIMIT
    while (begun := sum(process.jobs for process in workers.begun())) < jobs:
        if time.monotonic() > ends:
            raise BenchError(f"only {begun:,} of {jobs:,} jobs had begun after {_RUN_LIMIT:g} s")
        await asyncio.sleep(_LOOK_EVERY)


def _without(latencies: list[float], first: list[float]) -> list[float]:
    """Those that came later: each process writes a list of its own, so the first of all are not at the front."""
    left = Counter(latencies) - Counter(first)
    return list(left.elements())


def _cpu_between(at_first: dict[int, float], begun: list[Begun], at_end: dict[int, float]) -> float | None:
    """The CPU from each process' first job on, seconds: a process knows that moment better than we do."""
    if not at_end:
        return None
    start = {**at_first, **{process.pid: process.first_cpu / 1e9 for process in begun}}
    return sum(used - start.get(pid, 0.0) for pid, used in at_end.items())
