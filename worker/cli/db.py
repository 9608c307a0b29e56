"""`exarq db`: the revision of the tables."""

from __future__ import annotations

import asyncio

from rich.console import Console

from worker.cli.database import database
from worker.cli.output import note, print_json, print_line
from worker.db import migrate
from worker.db.migrate import Revisions
from worker.settings import load_settings


def upgrade_schema(*, as_json: bool) -> None:
    """Migrate to the head and print what was done."""
    with Console(stderr=True).status("migrating; waits for locks that others hold"):
        before = asyncio.run(_upgrade())
    if as_json:
        print_json({"before": before.current, "current": before.head})
    elif before.up_to_date:
        print_line(f"already at {before.head}")
    else:
        print_line(f"upgraded from {before.current or 'nothing'} to {before.head}")


def print_current(*, as_json: bool) -> None:
    """Print where the tables are and where this version wants them."""
    found = asyncio.run(_current())
    if as_json:
        print_json({"current": found.current, "head": found.head, "up_to_date": found.up_to_date})
    elif found.up_to_date:
        print_line(f"{found.head} (up to date)")
    else:
        print_line(f"{found.current or 'nothing'} (this version needs {found.head}; run `exarq db upgrade`)")


def print_sql(since: str | None) -> None:
    """Print what brings the tables from a revision, or from where they are, to the head."""
    if since is None:
        found = asyncio.run(_current())
        if found.up_to_date:
            note(f"already at {found.head}; `exarq db sql --from base` prints all of it")
            return
        since = found.current or "base"
    print_line(migrate.sql(since).rstrip())


async def _upgrade() -> Revisions:
    async with database(load_settings()) as engine:
        return await migrate.upgrade(engine)


async def _current() -> Revisions:
    async with database(load_settings()) as engine, engine.connect() as connection:
        return await migrate.revisions(connection)
