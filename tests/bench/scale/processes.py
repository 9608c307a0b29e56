"""How throughput, latency and the cost of a job change with more worker processes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Final

from tests.bench.scale import ready
from tests.bench.scale.findings import Finding, Findings, of_latencies
from tests.bench.scale.stage import WORKLOAD, Stage

PROCESSES: Final = (1, 2, 3, 4)
_LATENCIES: Final = 100
_SHARE: Final = {"noop": 2, "orm": 1 / 8}  # so that a run lasts some seconds


async def processes(stage: Stage, findings: Findings, counts: Sequence[int], jobs: int, rounds: int) -> None:
    """Noop and orm, and the latency of a job that finds them all idle."""
    rig = await stage.rig()
    for count in counts:
        case = f"{count} process{'es' if count > 1 else ''}"
        for key, share in _SHARE.items():
            workload = replace(WORKLOAD[key], processes=count)
            await rig.prepare()
            async with rig.script.workers(key, rig.concurrency(workload), count) as workers:
                await ready.warmed(rig, workers, workload)
                costs = [await ready.run(rig, workers, workload, max(round(jobs * share), 10)) for _ in range(rounds)]
            findings.add(Finding("curves", case, key, median(cost.rate for cost in costs), "jobs/s"))
            findings.add(*ready.of_costs(case, key, costs))
        workload = replace(WORKLOAD["latency"], processes=count)
        findings.add(*of_latencies("curves", case, await rig.run(workload, rig.concurrency(workload), _LATENCIES)))
