"""Bring the schema to this version's head, one process at a time, without standing in the way of running jobs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.core.errors import ExarqError, SchemaNotMigrated
from worker.db.models import SCHEMA

if TYPE_CHECKING:
    from alembic.config import Config

HEAD: Final = "0003"
"""The newest revision in `migrations/versions`, so that only a migration pays for Alembic's import."""

BASE: Final = "base"
"""Alembic's word for a database without any revision."""

_ADVISORY_LOCK: Final = 0x6578617271  # "exarq"
_LOCK_NOT_AVAILABLE: Final = "55P03"


@dataclass(frozen=True, slots=True)
class Revisions:
    """Where the schema is and where this version wants it; `current` is None before the first upgrade."""

    current: str | None
    head: str

    @property
    def up_to_date(self) -> bool:
        """Whether there is nothing to migrate."""
        return self.current == self.head


class MigrationBlocked(ExarqError):
    """Raised when the tables stayed locked through every try of a migration."""


async def upgrade(engine: AsyncEngine, *, tries: int = 20, lock_timeout_ms: int = 1000) -> Revisions:
    """Migrate to the head in one transaction; returns the revisions from before.

    An `ALTER TABLE` that waits behind one long job makes every claim wait behind itself, so it waits `lock_timeout_ms`
    at the most and then makes room before it tries again.

    Raises:
        MigrationBlocked: after the last try.
        SchemaNotMigrated: the schema is newer than this version.

    """
    for attempt in range(tries):
        try:
            async with engine.begin() as connection:
                await connection.execute(text(f"SET LOCAL lock_timeout = {int(lock_timeout_ms)}"))
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
                before = await revisions(connection)
                _refuse_unknown(before)
                if not before.up_to_date:
                    await connection.run_sync(_to_head)
                return before
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
        await asyncio.sleep(min(0.1 * 2**attempt, 2.0))
    raise MigrationBlocked(
        f"the tables were locked through {tries} tries; end long transactions (see pg_stat_activity) and run it again"
    )


async def revisions(connection: AsyncConnection) -> Revisions:
    """Where the schema is and where this version wants it; reads only."""
    table = f"{SCHEMA}.alembic_version"
    if (await connection.execute(text("SELECT to_regclass(:table)"), {"table": table})).scalar() is None:
        return Revisions(None, HEAD)
    current = (await connection.execute(text(f"SELECT version_num FROM {table}"))).scalar()  # noqa: S608 — a constant
    return Revisions(current, HEAD)


async def require_migrated(connection: AsyncConnection) -> None:
    """Raise `SchemaNotMigrated` unless the schema is the one this version needs."""
    found = await revisions(connection)
    if found.current is None:
        raise SchemaNotMigrated("the database has no exarq schema yet; run `exarq db upgrade`")
    if not found.up_to_date:
        raise SchemaNotMigrated(
            f"the exarq schema is at {found.current}, this version needs {found.head}; run `exarq db upgrade`"
            " with the newest version that uses this database"
        )


def sql(since: str) -> str:
    """What brings the schema from a revision (`base`: from nothing) to the head, as SQL in one transaction.

    Raises: `SchemaNotMigrated` when this version does not know the revision.
    """
    from alembic import command

    if since != BASE and since not in _known():
        raise SchemaNotMigrated(f"no revision {since!r}; this version knows {', '.join([BASE, *_known()])}")
    config, written = _config(), StringIO()
    config.output_buffer = written
    command.upgrade(config, f"{since}:head", sql=True)
    return written.getvalue()


def _known() -> list[str]:
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]


def _refuse_unknown(found: Revisions) -> None:
    known = _known()
    if found.current is not None and found.current not in known:
        raise SchemaNotMigrated(
            f"the exarq schema is at {found.current}, which this version does not know; run `exarq db upgrade` with the"
            " newest version that uses this database"
        )


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "worker:db/migrations")
    config.set_main_option("path_separator", "os")
    return config


def _to_head(connection: Connection) -> None:
    known = connection.execute(text("SELECT to_regnamespace(:name)"), {"name": SCHEMA}).scalar()
    if known is None:
        connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
