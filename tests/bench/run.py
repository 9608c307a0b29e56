"""A whole run: the servers, the systems, and the rounds in which they take turns."""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.ext.asyncio import create_async_engine

from tests.bench import business
from tests.bench.install import Installed, Missing, install
from tests.bench.measure import Bench, Run
from tests.bench.processes import BenchError, Script
from tests.bench.screen import Screen
from tests.bench.servers import Servers, measured_servers
from tests.bench.workloads import EXARQ, LIMIT, Plan, Workload, jobs_for


@dataclass
class Measured:
    """All runs of one workload by one system, by round; a failed one says why and ends its row."""

    system: Installed
    workload: Workload
    jobs: int = 0
    runs: dict[int, Run] = field(default_factory=dict)
    failed: str | None = None


@dataclass
class Results:
    """What a run has shown."""

    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)

    def of(self, system: str, key: str) -> dict[int, Run]:
        """The runs of this system and the workload of this key, by round; none where it took no part or failed."""
        found = self.measured.get((system, key))
        return found.runs if found else {}

    @property
    def systems(self) -> list[Installed]:
        """The systems that took part."""
        return list({found.system.name: found.system for found in self.measured.values()}.values())


async def run(plan: Plan, screen: Screen) -> Results:
    """Measure everything in the plan."""
    results = Results()
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(measured_servers())
        screen.introduce(servers.facts, await servers.commit_ms())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="exarq-bench-")))
        benches: dict[str, Bench] = {}
        for name in plan.systems:
            found = await install(name, plan.folder)
            if isinstance(found, Installed):
                try:
                    benches[name] = await _prepared(stack, servers, found, folder)
                except BenchError as error:
                    found = Missing(name, str(error))
            if isinstance(found, Missing):
                results.missing.append(found)
                screen.missing(found)
                continue
            for workload in plan.workloads:
                if workload.name in found.about.workloads and workload.processes <= found.about.processes:
                    results.measured[found.name, workload.key] = Measured(found, workload)
        with screen.progress(sum(plan.rounds_of(*key) + 1 for key in results.measured)):
            for number in range(-1, plan.last):
                for workload in plan.workloads:
                    await _round(plan, workload, benches, results, screen, number)
    return results


async def _prepared(stack: AsyncExitStack, servers: Servers, system: Installed, folder: Path) -> Bench:
    """The system with a database of its own, its tables and those of the business in it."""
    url = await servers.database(system.name)
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://", 1))
    try:
        await business.install(engine)
    finally:
        await engine.dispose()
    own = folder / system.name
    own.mkdir()
    script = Script(system.path, system.python, own, url, servers.redis_url)
    await stack.enter_async_context(script.controlled())
    await script.ask("install")
    return Bench(servers, script, url)


async def _round(
    plan: Plan, workload: Workload, benches: dict[str, Bench], results: Results, screen: Screen, number: int
) -> None:
    """Each system once, one after the other: what changes on the machine from round to round meets all of them."""
    rows = {name: row for (name, key), row in results.measured.items() if key == workload.key}
    for name, row in rows.items():
        if row.failed or number >= plan.rounds_of(name, workload.key):
            continue
        try:
            await _one(plan, row, benches[name], rows, number)
        except BenchError as error:
            row.failed = str(error)
        screen.measured(row, number)


async def _one(plan: Plan, row: Measured, bench: Bench, rows: dict[str, Measured], number: int) -> None:
    """Run once; the run before the first round is not counted and shows how many jobs it takes."""
    workload = row.workload
    about = row.system.about
    concurrency = about.concurrency.get(workload.name, workload.concurrency)
    if number >= 0:
        row.runs[number] = await bench.run(workload, concurrency, row.jobs)
        return
    row.jobs = plan.jobs or workload.jobs // (2 if plan.quick else 1)
    if workload.kind == "throughput" and plan.jobs is None:
        row.jobs = await _jobs(plan, workload, bench, concurrency)
        if row.system.name == LIMIT and EXARQ in rows and rows[EXARQ].jobs:
            row.jobs = rows[EXARQ].jobs  # a pair does the same


async def _jobs(plan: Plan, workload: Workload, bench: Bench, concurrency: int) -> int:
    """How many jobs last as long as planned; a short run says too few, for it is mostly the opening of connections."""
    jobs = workload.pilot
    while True:
        pilot = await bench.run(workload, concurrency, jobs)
        assert pilot.rate is not None
        before, jobs = jobs, jobs_for(workload, pilot.rate, plan.seconds)
        if jobs <= 2 * before or plan.quick:
            return jobs
