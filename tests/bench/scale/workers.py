"""How upkeep and claims grow with the workers of an installation, many of them on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Final

from tests.bench.scale import ready
from tests.bench.scale.findings import Finding, Findings
from tests.bench.scale.idle import SETTLING, watched
from tests.bench.scale.stage import WORKLOAD, Rig, Stage
from tests.bench.scale.wire import counted

WORKERS: Final = (1, 3, 6, 12)
_IDLE_SHARE: Final = 3  # of the time that the part `idle` looks on
_ROUNDS: Final = 3


async def workers(stage: Stage, findings: Findings, counts: Sequence[int], jobs: int, seconds: float) -> None:
    """So many idle workers, all together; then the same ones busy with jobs that do nothing, so that claims compete."""
    rig = await stage.rig()
    for count in counts:
        await _of(rig, findings, count, jobs, seconds / _IDLE_SHARE)


async def _of(rig: Rig, findings: Findings, count: int, jobs: int, seconds: float) -> None:
    await rig.prepare()
    workload, many = replace(WORKLOAD["noop"], processes=count), "s" if count > 1 else ""
    async with (
        counted(rig.url) as (wire, url),
        rig.script.at(url).workers("noop", rig.concurrency(workload), count) as running,
    ):
        await rig.started(count)
        await asyncio.sleep(SETTLING)
        idle = await watched(rig, wire, running, seconds)
        findings.add(
            Finding("curves", f"{count} idle worker{many}", "SQL statements of all", idle.statements, "/s"),
            Finding("curves", f"{count} idle worker{many}", "Redis commands of all", idle.redis_commands, "/s"),
            Finding("curves", f"{count} idle worker{many}", "CPU of all", idle.cpu * 100, "% of a core"),
        )
        await ready.warmed(rig, running, workload)
        before = wire.statements
        costs = [await ready.run(rig, running, workload, jobs) for _ in range(_ROUNDS)]
        sent = (wire.statements - before) / (_ROUNDS * jobs)
    case = f"{count} busy worker{many}"
    findings.add(*ready.of_costs(case, "noop", costs))
    findings.add(
        Finding("curves", case, "jobs of a claim", median(cost.claimed for cost in costs)),
        Finding("curves", case, "SQL statements of 1,000 noop", sent * 1000),
    )
