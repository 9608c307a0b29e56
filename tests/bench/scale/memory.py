"""How much memory a worker needs, beside ARQ's, and whether it grows with the jobs it has run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from tests.bench.processes import BenchError, Workers
from tests.bench.rows import ratio
from tests.bench.scale.findings import Finding, Findings
from tests.bench.scale.stage import WORKLOAD, Rig, Stage
from tests.bench.workloads import Workload

_MOST: Final = 1.5
_GROWTH: Final = 5.0
_AHEAD: Final = 50_000
_BATCH: Final = 25_000
_LOOK_EVERY: Final = 0.1
_STANDSTILL: Final = 60.0


async def beside_arq(stage: Stage, findings: Findings, jobs: int, rounds: int) -> None:
    """The highest resident memory after so many jobs that write one row each."""
    ours, theirs = await stage.rig(), await stage.rig("arq")
    pairs = [(await ours.once("orm", jobs), await theirs.once("orm", jobs)) for _ in range(rounds)]
    found = ratio(
        {n: a for n, (a, _) in enumerate(pairs)}, {n: b for n, (_, b) in enumerate(pairs)}, lambda r: r.memory_mb
    )
    if found is None:
        raise BenchError("this system does not tell how much memory a process has")
    said = ", ".join(f"{a.memory_mb:.1f} : {b.memory_mb:.1f} MB" for a, b in pairs if a.memory_mb and b.memory_mb)
    findings.add(Finding("memory", f"{jobs:,} orm jobs", "VmHWM beside arq's", found.median, "×", "≤", _MOST, said))


async def growth(stage: Stage, findings: Findings, spans: Mapping[str, tuple[int, int]]) -> None:
    """For each workload one worker that runs on and on, fed as it goes: its memory at the span's first job and at its last."""
    for key, (first, last) in spans.items():
        await _growth(stage, findings, WORKLOAD[key], first, last)


async def _growth(stage: Stage, findings: Findings, workload: Workload, first: int, last: int) -> None:
    rig = await stage.rig()
    await rig.prepare()
    began = time.monotonic()
    async with rig.script.workers(workload.name, rig.concurrency(workload), 1) as workers:
        feeding = asyncio.create_task(_feed(rig, workers, workload, last))
        try:
            at_first = await _memory_at(workers, first, feeding)
            at_last = await _memory_at(workers, last, feeding)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
    grown = (at_last / at_first - 1) * 100
    note = (
        f"{at_first:.1f} → {at_last:.1f} MB, {last / (time.monotonic() - began):,.0f} jobs/s while they were enqueued"
    )
    findings.add(
        Finding(
            "memory", f"{workload.name} job {first:,} to {last:,}", "growth of VmHWM", grown, "%", "<", _GROWTH, note
        )
    )


async def _feed(rig: Rig, workers: Workers, workload: Workload, jobs: int) -> None:
    enqueued = 0
    while enqueued < jobs:
        if enqueued - _begun(workers) < _AHEAD:
            await rig.enqueue(workload, min(_BATCH, jobs - enqueued))
            enqueued += _BATCH
        else:
            await asyncio.sleep(_LOOK_EVERY)


async def _memory_at(workers: Workers, jobs: int, feeding: asyncio.Task[None]) -> float:
    """The highest resident memory once so many jobs have begun, MB."""
    best, moved_at = 0, time.monotonic()
    while (begun := _begun(workers)) < jobs:
        if begun > best:
            best, moved_at = begun, time.monotonic()
        elif time.monotonic() - moved_at > _STANDSTILL:
            raise BenchError(f"nothing has begun for {_STANDSTILL:g} s, after {begun:,} jobs")
        if feeding.done() and (error := feeding.exception()):
            raise error
        await asyncio.sleep(_LOOK_EVERY)
    found = workers.memory_mb()
    if found is None:
        raise BenchError("this system does not tell how much memory a process has")
    return found


def _begun(workers: Workers) -> int:
    return sum(process.jobs for process in workers.begun())
