"""`exarq run`: a worker, or a parent of several, and the embedded servers they need if the settings ask for them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog.contextvars

from worker.cli.database import database
from worker.cli.modules import load_jobs
from worker.cli.output import complain, note
from worker.core.errors import ArgumentsInvalid, DatabaseUnreachable, ExarqError
from worker.db.migrate import upgrade
from worker.embedded import attach, servers
from worker.embedded.kept import Kept
from worker.observe.logs import configure
from worker.process import leave_threads_behind, run_worker
from worker.settings import Settings, load_settings
from worker.settings.values import EMBEDDED
from worker.supervise.lifeline import AWAY, Lifeline, Place
from worker.supervise.parent import Parent, command
from worker.upkeep.heartbeat_file import heartbeat_file


def run_until_stopped(
    *,
    burst: bool,
    concurrency: int | None,
    queues: list[str] | None,
    processes: int | None = None,
    supervised: str | None = None,
) -> None:
    """Run a worker until it is told to stop, or until nothing is left to do; what it started ends with it."""
    chosen = {"concurrency": concurrency, "queues": queues or None, "processes": processes}
    settings = load_settings(worker={name: value for name, value in chosen.items() if value is not None})
    configure(settings.log.level, settings.log.format)
    if supervised is not None:
        with _threads_left_behind():
            _run_below_a_parent(settings, supervised, burst=burst)
    elif settings.worker.processes > 1:
        _run_processes(settings, burst=burst)
    else:
        load_jobs(settings)  # before servers are started for nothing
        with _threads_left_behind(), embedded_servers(settings), heartbeat_file(settings) as beaten:
            run_worker(settings, burst=burst, beaten=beaten)


def _run_processes(settings: Settings, *, burst: bool) -> None:
    worker = settings.worker
    words = ["run", *(["--burst"] if burst else []), "--concurrency", str(worker.concurrency)]
    words += [word for queue in worker.queues for word in ("--queue", queue)]
    with embedded_servers(settings):
        code = asyncio.run(Parent(settings, command(words), burst=burst).run())
    sys.exit(code)


def _run_below_a_parent(settings: Settings, supervised: str, *, burst: bool) -> None:
    try:
        place = Place.parse(supervised)
        lifeline = Lifeline(place.file)
    except (ValueError, OSError):
        raise ArgumentsInvalid("--supervised is between a parent and its processes; use --processes") from None
    structlog.contextvars.bind_contextvars(process=place.number)
    try:
        with heartbeat_file(settings, number=place.number, of=place.of, leader=os.getppid()) as beaten:
            run_worker(settings, burst=burst, obey=lifeline.obey, beaten=beaten)
    except DatabaseUnreachable:
        lifeline.say(AWAY)
        raise


@contextmanager
def _threads_left_behind() -> Iterator[None]:
    """The process ends with the block, also with an error of ours, whatever threads jobs and hooks have left."""
    try:
        yield
    except ExarqError as error:
        complain(str(error))
        leave_threads_behind(code=2)
        sys.exit(2)
    leave_threads_behind()


@contextmanager
def embedded_servers(settings: Settings) -> Iterator[None]:
    """The private servers that the settings ask for, while the block lasts: those that run here, else new ones."""
    wanted = embedded(settings)
    if not wanted:
        yield
    elif attach.find(str(settings.settings_key())) is not None:
        note("using the embedded servers of another command here; they end with that command")
        yield
    else:
        with started_servers(settings):
            note(f"embedded {' and '.join(wanted)} started; the data are temporary and end with this command")
            yield


def embedded(settings: Settings) -> list[str]:
    """Which servers the settings want to be private ones."""
    addresses = {"PostgreSQL": settings.require_database_url(), "Redis": settings.require_redis_url()}
    return [name for name, address in addresses.items() if address == EMBEDDED]


@contextmanager
def started_servers(settings: Settings, kept: Kept | None = None) -> Iterator[None]:
    """Those servers while the block lasts, migrated, and found by the other commands here."""
    wanted = embedded(settings)
    with servers.start(postgres="PostgreSQL" in wanted, redis="Redis" in wanted, kept=kept) as running:
        if running.urls.postgres:
            asyncio.run(_migrate(settings, running.urls.database_url))
        attach.announce(running, str(settings.settings_key()))
        yield


async def _migrate(settings: Settings, url: str) -> None:
    async with database(settings, url) as engine:
        await upgrade(engine)
