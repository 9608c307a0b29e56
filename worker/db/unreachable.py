"""What to say, in one line, when PostgreSQL is away or refuses; a password is never shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from worker.core.errors import DatabaseUnreachable, ExarqError
from worker.db.failures import is_away, refusal_by_a_pooler, sqlstate_of
from worker.settings.values import masked

# Class 28: who you are. 3D000: no such database. 42501: what you may do.
_REFUSED: Final = ("28", "3D000", "42501")

_READ_ONLY: Final = "25006"


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Raise `DatabaseUnreachable` where PostgreSQL is away or refuses; any other error keeps its traceback."""
    with refusals(url):
        try:
            yield
        except Exception as error:
            if not is_away(error) or isinstance(error, ExarqError):
                raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            if refusal_by_a_pooler(error):
                raise DatabaseUnreachable(
                    f"a pooler answers at {masked(url)}; set database.pooler (EXARQ_DATABASE_POOLER) to pgbouncer"
                ) from error
            raise DatabaseUnreachable(
                f"PostgreSQL does not answer at {masked(url)} ({why}); start it, or correct EXARQ_DATABASE_URL"
            ) from error


@contextmanager
def refusals(url: str) -> Iterator[None]:
    """Raise `DatabaseUnreachable` where PostgreSQL refuses this user or this database, or takes no writes."""
    try:
        yield
    except Exception as error:
        code = sqlstate_of(error) or ""
        if not code.startswith((*_REFUSED, _READ_ONLY)):
            raise
        why = str(getattr(error, "orig", error)).splitlines()[0].rpartition(">: ")[2]
        if code == _READ_ONLY:
            raise DatabaseUnreachable(
                f"PostgreSQL takes no writes at {masked(url)} ({why}); give the address of the primary, or turn"
                " default_transaction_read_only off"
            ) from error
        raise DatabaseUnreachable(
            f"PostgreSQL refuses at {masked(url)} ({why}); correct EXARQ_DATABASE_URL, or create what is missing"
        ) from error
