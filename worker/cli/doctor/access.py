"""Whether PostgreSQL takes what a worker writes, from this user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.cli.doctor.finding import Finding, error, ok
from worker.db.models import SCHEMA, Base, Installation

REFUSED: Final = "42501"
"""PostgreSQL's code for what this user may not do."""

_NEEDED: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")
_MAY: Final = text("SELECT has_table_privilege(to_regclass(:table), :privilege)")


async def writes(connection: Any) -> Finding:
    """Whether the server takes writes; the connection's own transaction may be read-only."""
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        return error("writes", "a hot standby, which takes none", "point EXARQ_DATABASE_URL at the primary")
    if await connection.fetchval("SELECT current_setting('default_transaction_read_only')") == "on":
        return error(
            "writes",
            "default_transaction_read_only is on, so nothing can be enqueued, claimed or completed",
            "turn it off for this database and this user",
        )
    return ok("writes", "taken")


async def rights(connection: AsyncConnection) -> Finding:
    """Whether this user may do with Exarq's tables what a worker does."""
    missing = [
        f"{privilege} on {table}"
        for table, privilege in _needed()
        if not await connection.scalar(_MAY, {"table": table, "privilege": privilege})
    ]
    if not missing:
        return ok("privileges", f"{', '.join(_NEEDED)} on Exarq's tables")
    shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    return error("privileges", f"this user lacks {shown}", _grant())


def _needed() -> Iterator[tuple[str, str]]:
    for table in Base.metadata.sorted_tables:
        privileges = ("SELECT",) if table is Installation.__table__ else _NEEDED
        yield from ((table.fullname, privilege) for privilege in privileges)


def no_schema() -> Finding:
    """What is said where even the schema is closed."""
    return error("privileges", f"this user may not use the schema {SCHEMA}", f"GRANT USAGE ON SCHEMA {SCHEMA} to it")


def _grant() -> str:
    return f"GRANT {', '.join(_NEEDED)} ON ALL TABLES IN SCHEMA {SCHEMA} to it"
