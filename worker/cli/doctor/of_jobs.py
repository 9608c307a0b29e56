"""The user's modules, the workers that are there, and jobs that nobody will run."""

from __future__ import annotations

from worker.cli.database import database
from worker.cli.doctor.finding import Finding, error, ok, warning
from worker.cli.modules import load_jobs
from worker.cli.overview import standing
from worker.core.errors import ExarqError, SchemaNotMigrated
from worker.core.registry import default_registry
from worker.db import overview
from worker.db.migrate import require_migrated
from worker.settings import Settings

_MOST_NAMES = 1_000


def modules(settings: Settings) -> list[Finding]:
    """Whether the modules can be imported and register jobs."""
    named = ", ".join(settings.jobs.modules)
    if not named:
        return [warning("jobs.modules", "names no module", "name those with your jobs, else a worker has none to run")]
    try:
        load_jobs(settings)
    except ExarqError as wrong:
        return [error("jobs.modules", str(wrong), "a worker does not start without it")]
    count = len(default_registry.names())
    if not count:
        return [error("jobs.modules", f"{named} registers no job", "decorate functions with @job")]
    return [ok("jobs.modules", f"{named}: {count} job{'' if count == 1 else 's'}")]


async def look(settings: Settings, url: str) -> list[Finding]:
    """All findings of the workers and of what waits; none where the tables are not as this version needs them."""
    async with database(settings, url) as engine, engine.connect() as connection:
        try:
            await require_migrated(connection)
        except SchemaNotMigrated:
            return []
        workers = await overview.workers(connection)
        queues = await overview.queues(connection, lease=settings.worker.lease)
        names = await overview.waiting_names(connection, most=_MOST_NAMES)
    standings = [standing(line, settings.worker.lease) for line in workers]
    nobody = {line.queue: line.waiting + line.retrying for line in queues.values() if not line.workers}
    return [_workers(standings), _served({queue: count for queue, count in nobody.items() if count}), _known(names)]


def _workers(standings: list[str]) -> Finding:
    dead, alive = standings.count("dead"), len(standings) - standings.count("dead")
    if dead:
        advice = "a living one gives their jobs back" if alive else "start one, it gives their jobs back: `exarq run`"
        return warning("workers", f"{dead} dead, {alive} alive", advice)
    if not alive:
        return warning("workers", "none is there", "start one with `exarq run`")
    return ok("workers", f"{alive} alive")


def _served(nobody: dict[str, int]) -> Finding:
    if not nobody:
        return ok("queues", "all that have jobs to run are served")
    waits = ", ".join(f"{queue} ({count:,})" for queue, count in sorted(nobody.items()))
    return warning(
        "queues",
        f"jobs wait where no living worker takes from: {waits}",
        "name them in worker.queues, or start a worker with `exarq run --queue …`",
    )


def _known(names: dict[str, int]) -> Finding:
    if not default_registry.names():
        return ok("names", "not compared: no job is registered here")
    unknown = {name: count for name, count in names.items() if name not in default_registry}
    if not unknown:
        return ok("names", "all that wait are registered here")
    waits = ", ".join(f"{name} ({count:,})" for name, count in sorted(unknown.items()))
    return warning(
        "names",
        f"jobs wait that no module here registers: {waits}",
        "add their modules to jobs.modules, or cancel them with `exarq jobs cancel --name …`",
    )
