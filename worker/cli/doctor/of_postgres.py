"""PostgreSQL: its settings, what stands between, the tables, and who keeps it from cleaning up."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from worker.cli.database import database
from worker.cli.doctor import access, pooled
from worker.cli.doctor.finding import Finding, error, ok, warning
from worker.cli.output import duration, length
from worker.core.errors import SchemaNotMigrated
from worker.db.engine import processor_engine
from worker.db.failures import sqlstate_of
from worker.db.migrate import HEAD, require_migrated
from worker.db.unreachable import database_errors
from worker.resources import connections_of
from worker.settings import Settings

_LEAST_VERSION: Final = 13  # gen_random_uuid() without an extension
_LONG: Final = timedelta(minutes=10)
CLOCKS_APART: Final = timedelta(seconds=5)

# Setting, its wanted value, and what happens otherwise.
_DURABLE: Final = {
    "fsync": "a crash of the machine may destroy the database",
    "full_page_writes": "a crash of the machine may destroy pages",
    "synchronous_commit": "a crash of the server may take back what it has called committed",
}

_SETTINGS: Final = """
    SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit',
        'autovacuum', 'track_counts', 'max_connections', 'superuser_reserved_connections', 'server_version_num',
        'server_version')
"""
_OPEN: Final = """
    SELECT pid, coalesce(nullif(application_name, ''), usename) AS who, state, clock_timestamp() - xact_start AS age
    FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND xact_start < clock_timestamp() - $1::interval
    ORDER BY xact_start LIMIT 1
"""
# Of other roles' backends a role without pg_read_all_stats sees pid, role and name only; the server's own have no role.
_CONNECTED: Final = """
    SELECT count(*) FROM pg_stat_activity
    WHERE coalesce(backend_type, 'client backend') = 'client backend' AND usesysid IS NOT NULL
        AND application_name NOT LIKE 'exarq %' AND pid <> pg_backend_pid()
"""
_SEES_OTHERS: Final = "SELECT pg_has_role('pg_read_all_stats', 'USAGE')"


async def look(settings: Settings, url: str) -> list[Finding]:
    """All findings of PostgreSQL.

    Raises: `DatabaseUnreachable`.
    """
    with database_errors(url):
        async with _plain(settings, url) as connection:
            found = dict(await connection.fetch(_SETTINGS))
            findings = [_version(found), await access.writes(connection), *_durability(found), _vacuum(found)]
            sees_others = await connection.fetchval(_SEES_OTHERS)
            findings.append(_transactions(await connection.fetchrow(_OPEN, _LONG), sees_others=sees_others))
            findings.append(await _clock(connection))
            others = await connection.fetchval(_CONNECTED)
            between = await _between(settings, url, connection)
    findings.append(between)
    if between.level == "error":
        return findings
    tables = await _schema(settings, url)
    if settings.database.pooler is None:
        return [*findings, *tables, _connections(settings, found, others)]
    return [*findings, *tables, await pooled.look(settings, url)]


@asynccontextmanager
async def _plain(settings: Settings, url: str) -> AsyncIterator[Any]:
    """A connection that asks for nothing special, in a transaction: it works through any pooler."""
    sqlalchemys: Any = asyncpg_dialect.dialect
    _, options = sqlalchemys().create_connect_args(make_url(url))
    for own in ("prepared_statement_cache_size", "prepared_statement_name_func"):
        options.pop(own, None)
    limit = settings.database.connect_timeout.total_seconds()
    connection: Any = await asyncpg.connect(**options, statement_cache_size=0, timeout=limit, command_timeout=limit)
    try:
        async with connection.transaction(readonly=True):
            yield connection
    finally:
        await connection.close(timeout=limit)


def _version(found: dict[str, str]) -> Finding:
    if int(found["server_version_num"]) // 10_000 < _LEAST_VERSION:
        return error("version", found["server_version"], f"Exarq needs PostgreSQL {_LEAST_VERSION} or newer")
    return ok("version", f"PostgreSQL {found['server_version']}")


def _durability(found: dict[str, str]) -> list[Finding]:
    off = [name for name in _DURABLE if found[name] == "off"]
    return [warning(name, "off", f"{_DURABLE[name]}; turn it on, unless the data are throw-away") for name in off] or [
        ok("durability", ", ".join(f"{name} is {found[name]}" for name in _DURABLE))
    ]


def _vacuum(found: dict[str, str]) -> Finding:
    off = [name for name in ("autovacuum", "track_counts") if found[name] == "off"]
    if off:
        return warning("autovacuum", f"{' and '.join(off)} off", "dead rows slow every claim down; turn it on")
    return ok("autovacuum", "on")


def _transactions(oldest: Any, *, sees_others: bool = True) -> Finding:
    if oldest is None and not sees_others:
        return warning(
            "open transactions",
            "this user cannot see those of other roles",
            "GRANT pg_read_all_stats to it, and look again",
        )
    if oldest is None:
        return ok("open transactions", f"none is older than {duration(_LONG)}")
    who = f"{oldest['who']} (pid {oldest['pid']}, {oldest['state']}) has one open for {length(oldest['age'])}"
    return warning("open transactions", who, "dead rows cannot be removed meanwhile; end it, or find out who needs it")


async def _clock(connection: Any) -> Finding:
    before, asked = time.monotonic(), datetime.now(UTC)
    theirs = await connection.fetchval("SELECT clock_timestamp()")
    return clock("clock of PostgreSQL", asked + timedelta(seconds=(time.monotonic() - before) / 2), theirs)


def clock(what: str, ours: datetime, theirs: datetime) -> Finding:
    """How far a server's clock is from this machine's."""
    apart = abs(theirs - ours)
    if apart < CLOCKS_APART:
        return ok(what, f"within {max(apart.total_seconds(), 0.001):.3f} s of this machine's")
    return warning(
        what, f"{length(apart)} {'ahead of' if theirs > ours else 'behind'} this machine's",
        "no rule depends on it, but logs and times will confuse you; set up NTP",
    )  # fmt: skip


async def _between(settings: Settings, url: str, connection: Any) -> Finding:
    """Whether a pooler stands between, and `database.pooler` says so.

    Its protocol names another backend than the server itself does.
    """
    between = connection.get_server_pid() != await connection.fetchval("SELECT pg_backend_pid()")
    told = settings.database.pooler is not None
    if told and not between:
        return warning(
            "connection",
            "database.pooler is set, and no pooler stands between",
            "leave it out: without it the server itself keeps the limits of statements and locks",
        )
    refused = await _refused(settings, url)
    if refused:
        return error("connection", f"what a worker asks for is refused ({refused})", _TELL if between else _ALLOW)
    if between and not told:
        return warning("connection", "a pooler such as PgBouncer stands between", _TELL)
    return ok("connection", "through a pooler, as database.pooler says" if between else "direct, no pooler between")


_TELL: Final = 'set database.pooler = "pgbouncer", or give the workers an address that leads to PostgreSQL itself'
_ALLOW: Final = "give the workers an address at which PostgreSQL takes settings at the start of a connection"


async def _refused(settings: Settings, url: str) -> str | None:
    """Why a connection with a worker's own settings is refused; None when it is not."""
    engine = processor_engine(
        url,
        application_name=lambda: "exarq doctor",
        connections=1,
        connect_timeout=settings.database.connect_timeout,
        statement_timeout=settings.database.statement_timeout,
        pooler=settings.database.pooler,
    )
    try:
        async with engine.connect():
            return None
    except Exception as refusal:
        if "startup parameter" not in str(refusal):
            raise
        return str(getattr(refusal, "orig", refusal)).splitlines()[0].rpartition(">: ")[2]
    finally:
        await engine.dispose()


async def _schema(settings: Settings, url: str) -> list[Finding]:
    async with database(settings, url) as engine, engine.connect() as connection:
        try:
            await require_migrated(connection)
        except SchemaNotMigrated as stale:
            found, _, advice = str(stale).partition("; ")
            return [error("tables", found, advice)]
        except DBAPIError as refused:
            if sqlstate_of(refused) != access.REFUSED:
                raise
            return [access.no_schema()]
        rights = await access.rights(connection)
    return [ok("tables", f"at {HEAD}, as this version needs them"), rights]


def _connections(settings: Settings, found: dict[str, str], others: int) -> Finding:
    limit = int(found["max_connections"]) - int(found["superuser_reserved_connections"])
    each = connections_of(settings.worker.concurrency)
    fit = (limit - others) // each
    said = (
        f"a worker with concurrency {settings.worker.concurrency} may open {each}; {limit} are allowed, {others} taken"
    )
    if fit < 1:
        return error("connections", said, "raise max_connections, or lower worker.concurrency")
    return ok("connections", f"{said}: {fit} worker{'' if fit == 1 else 's'} fit")
