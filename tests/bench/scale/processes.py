"""How throughput and latency change with more worker processes on this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tests.bench.rows import middle
from tests.bench.scale.findings import Finding, Findings, of_latencies
from tests.bench.scale.stage import WORKLOAD, Stage
from tests.bench.targets import rate_of

PROCESSES: Final = (1, 2, 4)
_LATENCIES: Final = 100


async def processes(stage: Stage, findings: Findings, jobs: int, rounds: int) -> None:
    """Noop and orm, and the latency of a job that finds them all idle."""
    rig = await stage.rig()
    for count in PROCESSES:
        case = f"{count} process{'es' if count > 1 else ''}"
        for key, of_it in (("noop", jobs), ("orm", max(jobs // 10, 100))):
            workload = replace(WORKLOAD[key], processes=count)
            runs = [await rig.run(workload, rig.concurrency(workload), of_it) for _ in range(rounds)]
            findings.add(Finding("curves", case, key, middle(runs, rate_of) or 0, "jobs/s"))
        workload = replace(WORKLOAD["latency"], processes=count)
        findings.add(*of_latencies("curves", case, await rig.run(workload, rig.concurrency(workload), _LATENCIES)))
