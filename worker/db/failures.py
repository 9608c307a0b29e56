"""What an error says about the database: away, contended, or about the data that were sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
from sqlalchemy import exc

from worker.core.errors import SchemaNotMigrated

# Class 08: connection exceptions. 57P01…57P05: ended by an administrator, a crash, a start or a shutdown, an idle
# limit. 53300: too many connections. 25P03, 25P04: ended after a time limit of the session.
_AWAY = frozenset({"57P01", "57P02", "57P03", "57P05", "53300", "25P03", "25P04"})
# A time limit of our own, or the server is short of room, or for now read-only.
_OVERLOADED = frozenset({"57014", "53000", "53100", "53200", "25006"})
_CONTENTION = frozenset({"40001", "40P01", "55P03"})
# Integrity, a serialization, a user's RAISE: what a COMMIT is refused for, and nothing that is sent behind it.
_REFUSALS = ("23", "40", "P0")
_ABORTED = "25P02"
_LEASE_LOST = "EXQ01"
_NO_SUCH_TABLE = "42P01"
_A_POOLER_SAYS = "unsupported startup parameter"


def sqlstate_of(error: BaseException) -> str | None:
    """PostgreSQL's code for the error, None when the server did not send one."""
    origin: Any = error.orig if isinstance(error, exc.DBAPIError) else error
    code = getattr(origin, "sqlstate", None)
    return code if isinstance(code, str) else None


@contextmanager
def schema_needed() -> Iterator[None]:
    """Raise `SchemaNotMigrated` where a table of Exarq's is not there."""
    try:
        yield
    except exc.DBAPIError as error:
        if sqlstate_of(error) == _NO_SUCH_TABLE:
            raise SchemaNotMigrated("the database has no exarq schema yet; run `exarq db upgrade`") from None
        raise


def is_away(error: BaseException) -> bool:
    """Whether the server did not answer, so that nobody knows whether it did the work."""
    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return True
    if isinstance(error, (OSError, TimeoutError, exc.TimeoutError, asyncpg.InterfaceError)):
        return True
    if isinstance(error, exc.InterfaceError):
        return True
    code = sqlstate_of(error)
    return code is not None and (code in _AWAY or code.startswith("08"))


def is_contention(error: BaseException) -> bool:
    """Whether the server gave up only because of others: the same statement may succeed at once."""
    return sqlstate_of(error) in _CONTENTION


def is_aborted(error: BaseException) -> bool:
    """Whether the server refused a statement only because an earlier one in its transaction had failed."""
    return sqlstate_of(error) == _ABORTED


def is_lease_lost(error: BaseException) -> bool:
    """Whether the function that completes a job found it held by somebody else."""
    return sqlstate_of(error) == _LEASE_LOST


def is_answer(error: BaseException) -> bool:
    """Whether the server answered the message with it, and goes on listening."""
    return sqlstate_of(error) is not None and not is_away(error)


def is_refusal(error: BaseException) -> bool:
    """Whether this is the server's own answer to a COMMIT, as after a deferred constraint: nothing was written.

    What else went wrong with the message may have done so behind its COMMIT.
    """
    return (sqlstate_of(error) or "").startswith(_REFUSALS)


def is_transient(error: BaseException) -> bool:
    """Whether sending the same again is the remedy."""
    return is_away(error) or is_contention(error) or sqlstate_of(error) in _OVERLOADED


def refusal_by_a_pooler(error: BaseException) -> str | None:
    """A pooler's own words where it refused what the connection asks for at its start, else None."""
    _, found, what = str(error).partition(_A_POOLER_SAYS)
    return found + what.splitlines()[0] if found else None
