"""`exarq dev`: servers that keep their data in the project, and a worker that starts anew when the code changes."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from sqlalchemy.ext.asyncio import AsyncEngine

from worker.addresses import database_url, redis_url
from worker.cli.database import database
from worker.cli.output import complain, note, print_facts
from worker.cli.run import embedded, started_servers
from worker.core.errors import EmbeddedServerError, SettingsError
from worker.db.failures import is_transient
from worker.db.migrate import revisions
from worker.embedded import attach
from worker.embedded.account import server_account
from worker.embedded.kept import NAME, Kept, keep
from worker.observe.logs import configure
from worker.settings import Settings, load_settings
from worker.settings.values import masked
from worker.supervise.parent import Parent, command

_LOOK_EVERY: Final = 1.0


def run_dev() -> None:
    """Run until Ctrl-C or SIGTERM.

    Raises: `EmbeddedServerError` when other servers run here already.
    """
    if find_spec("watchfiles") is None:
        raise SettingsError("exarq dev needs its extra; install exarq[dev]")
    settings = load_settings()
    configure(settings.log.level, settings.log.format)
    key = settings.settings_key()
    project = key.parent if key.is_file() else key
    with keep(project) as kept, _servers(settings, kept):
        print_facts(_addresses(settings, kept))
        code = asyncio.run(_work(settings, project))
    sys.exit(code)


@contextmanager
def _servers(settings: Settings, kept: Kept) -> Iterator[None]:
    if not embedded(settings):
        yield
        return
    if attach.find(str(settings.settings_key())) is not None:
        raise EmbeddedServerError("another command runs embedded servers here; stop it, then start `exarq dev` again")
    with started_servers(settings, kept):
        yield


async def _work(settings: Settings, project: Path) -> int:
    parent = Parent(settings, command(["run"]), renewable=True)
    watching = [
        asyncio.create_task(_watch_or_tell(project, parent)),
        asyncio.create_task(_watch_schema(settings, parent)),
    ]
    try:
        return await parent.run()
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def _watch_or_tell(project: Path, parent: Parent) -> None:
    try:
        await _watch(project, parent)
    except Exception as error:  # such as the system's limit of watched files
        complain(
            f"changes of the code are not seen any more: {error};"
            " raise the limit it names and start `exarq dev` again, or set WATCHFILES_FORCE_POLLING=1 for it"
        )


async def _watch_schema(settings: Settings, parent: Parent) -> None:
    """A worker that refused to start without its tables starts once they are there."""
    there = True
    async with database(settings) as engine:
        while True:
            before, there = there, await _is_migrated(engine, otherwise=there)
            if there and not before:
                note("the tables are there now; the worker starts anew")
                parent.renew()
            await asyncio.sleep(_LOOK_EVERY)


async def _is_migrated(engine: AsyncEngine, *, otherwise: bool) -> bool:
    try:
        async with engine.connect() as connection:
            return (await revisions(connection)).up_to_date
    except Exception as error:
        if not is_transient(error):
            raise
        return otherwise


async def _watch(project: Path, parent: Parent) -> None:
    from watchfiles import PythonFilter, awatch

    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it counts the changes that are named below

    class Code(PythonFilter):
        ignore_dirs = (*PythonFilter.ignore_dirs, NAME)

    code = Code(extra_extensions=(".toml",))
    async for changes in awatch(project, watch_filter=code, ignore_permission_denied=True):
        changed = sorted({Path(path).name for _, path in changes})
        note(f"{', '.join(changed[:3])}{' …' if len(changed) > 3 else ''} changed; the worker starts anew")
        parent.renew()


def _addresses(settings: Settings, kept: Kept) -> dict[str, str]:
    database, redis = database_url(settings), redis_url(settings)
    facts = {"PostgreSQL": masked(database), "Redis": masked(redis)}
    wanted = embedded(settings)
    if "PostgreSQL" in wanted:
        (host,) = parse_qs(urlsplit(database).query)["host"]
        facts["psql"] = f"psql -h {host} -U postgres postgres"
    if "Redis" in wanted:
        facts["redis-cli"] = f"redis-cli -s {urlsplit(redis).path}"
    if wanted:
        facts["data"] = str(kept.place(server_account()))
    return facts
