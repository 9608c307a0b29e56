"""`exarq run`: a worker, and the embedded servers it needs if the settings ask for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from worker.cli.database import database
from worker.cli.output import note
from worker.core.registry import load_modules
from worker.db.migrate import upgrade
from worker.embedded import attach, servers
from worker.observe.logs import configure
from worker.process import leave_threads_behind, run_worker
from worker.settings import Settings, load_settings
from worker.settings.values import EMBEDDED


def run_until_stopped(*, burst: bool, concurrency: int | None, queues: list[str] | None) -> None:
    """Run a worker until it is told to stop, or until nothing is left to do; what it started ends with it."""
    chosen = {"concurrency": concurrency, "queues": queues or None}
    settings = load_settings(worker={name: value for name, value in chosen.items() if value is not None})
    configure(settings.log.level, settings.log.format)
    load_modules(settings.jobs.modules)  # before servers are started for nothing
    with embedded_servers(settings):
        run_worker(settings, burst=burst)
    leave_threads_behind()


@contextmanager
def embedded_servers(settings: Settings) -> Iterator[None]:
    """The private servers that the settings ask for, while the block lasts: those that run here, else new ones."""
    postgres = settings.require_database_url() == EMBEDDED
    redis = settings.require_redis_url() == EMBEDDED
    key = str(settings.settings_key())
    if not (postgres or redis):
        yield
    elif attach.find(key) is not None:
        note("using the embedded servers of another command here; they end with that command")
        yield
    else:
        with servers.start(postgres=postgres, redis=redis) as running:
            if postgres:
                asyncio.run(_migrate(settings, running.urls.database_url))
            attach.announce(running, key)
            note(f"embedded {_named(postgres, redis)} started; the data are temporary and end with this command")
            yield


async def _migrate(settings: Settings, url: str) -> None:
    async with database(settings, url) as engine:
        await upgrade(engine)


def _named(postgres: bool, redis: bool) -> str:
    return " and ".join(name for name, started in (("PostgreSQL", postgres), ("Redis", redis)) if started)
