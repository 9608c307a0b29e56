"""Runs by workers that are all there and warm before the first job is: what a job costs, whoever started first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import asyncpg

from tests.bench.processes import BenchError, Workers
from tests.bench.scale.findings import Finding
from tests.bench.scale.stage import Rig
from tests.bench.workloads import Workload
from worker.settings import WorkerSettings

_LEFT: Final = "SELECT count(*) FROM exarq.job WHERE state = 'running'"
_CLAIMS: Final = "SELECT count(DISTINCT token) FROM exarq.job"  # that found something: a job keeps its claim's token
_LOOK_EVERY: Final = 0.01
_RUN_LIMIT: Final = 120.0
_WARMING: Final = 50
_BEATS: Final = WorkerSettings()
_LONGEST_STOP: Final = (_BEATS.lease - _BEATS.beat).total_seconds()  # the last beat may be as old when it begins


@dataclass(frozen=True)
class Cost:
    """What one run has shown, of each job.

    Args:
        rate: jobs a second.
        worker: CPU of the workers, µs.
        postgres: CPU of PostgreSQL, µs; None where nobody tells.
        claimed: how many jobs a claim took.

    """

    rate: float
    worker: float
    postgres: float | None
    claimed: float


async def warmed(rig: Rig, workers: Workers, workload: Workload) -> None:
    """Return once all are there and have run something: connections are open, statements prepared."""
    await rig.started(workload.processes)
    await run(rig, workers, workload, _WARMING * workload.processes)


async def run(rig: Rig, workers: Workers, workload: Workload, jobs: int) -> Cost:
    """All begin at once, with a full queue."""
    connection = await asyncpg.connect(
        rig.url
    )  # one for all looks: to connect costs PostgreSQL more than a hundred jobs
    try:
        return await _run(rig, workers, connection, workload, jobs)
    finally:
        await connection.close()


async def _run(rig: Rig, workers: Workers, connection: asyncpg.Connection[Any], workload: Workload, jobs: int) -> Cost:
    begun, claims = _begun(workers), await connection.fetchval(_CLAIMS)
    with workers.held():
        stopped_at = time.monotonic()
        await rig.enqueue(workload, jobs)
        cpu, postgres = sum(workers.cpu().values()), rig.servers.postgres_cpu()
        at = time.monotonic()
    require_short(at - stopped_at)
    async with asyncio.timeout(_RUN_LIMIT):
        while _begun(workers) - begun < jobs or await connection.fetchval(_LEFT):  # noqa: ASYNC110 — a store sets no Event
            await asyncio.sleep(_LOOK_EVERY)
    took, cpu = time.monotonic() - at, sum(workers.cpu().values()) - cpu
    after = rig.servers.postgres_cpu()
    return Cost(
        rate=jobs / took,
        worker=cpu / jobs * 1e6,
        postgres=None if postgres is None or after is None else (after - postgres) / jobs * 1e6,
        claimed=jobs / max(await connection.fetchval(_CLAIMS) - claims, 1),
    )


def require_short(stop: float) -> None:
    """Refuse to measure after a stop of so many seconds in which the workers may have lost their leases.

    Raises: `BenchError`.
    """
    if stop >= _LONGEST_STOP:
        raise BenchError(f"the workers stood still for {stop:.1f} s, {_LONGEST_STOP:g} s are allowed: leases ran out")


def of_costs(case: str, job: str, costs: Sequence[Cost]) -> list[Finding]:
    """The medians."""
    postgres = [cost.postgres for cost in costs if cost.postgres is not None]
    found = [Finding("curves", case, f"a worker's CPU of {job}", median(cost.worker for cost in costs), "µs")]
    if postgres:
        found.append(Finding("curves", case, f"PostgreSQL's CPU of {job}", median(postgres), "µs"))
    return found


def _begun(workers: Workers) -> int:
    return sum(process.jobs for process in workers.begun())
