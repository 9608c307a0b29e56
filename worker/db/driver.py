"""asyncpg's connection, where the end of a transaction takes along what would cost a round trip of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncpg

# As asyncpg's own transactions send them, and SQLAlchemy's through these.
_ENDS = _COMMIT, _ROLLBACK = "COMMIT;", "ROLLBACK;"


class Driver(asyncpg.Connection):
    """A connection of asyncpg's; SQLAlchemy makes it where it is given this class."""

    __slots__ = ("_along", "before_commit")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._along: tuple[str, str] | None = None
        self.before_commit: Callable[[], None] | None = None
        """Called before each COMMIT of a transaction of asyncpg's, and so of SQLAlchemy's, but for `end_with`."""

    def end_with(self, end: Callable[[], None], *, before: str = "", after: str = "") -> bool:
        """Call what ends the transaction, with these in the same message; False where it ended none.

        Args:
            end: sync code in a greenlet, as of SQLAlchemy.
            before: SQL without parameters, ended by a semicolon, for a COMMIT only; where it fails, nothing behind it
                takes place.
            after: SQL without parameters, outside of the transaction.

        """
        self._along = before, after
        try:
            end()
            return self._along is None
        finally:
            self._along = None

    @property
    def speaks_utf8(self) -> bool:
        """Whether the server reads SQL as it is meant: asyncpg writes it in UTF-8, whatever a job has set."""
        return str(self.get_settings().get_text_codec().name) == "utf-8"

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Execute as asyncpg does, with what is to be taken along."""
        if query in _ENDS:
            if self._along is not None:
                (before, after), self._along = self._along, None
                query = f"{before if query == _COMMIT else ''}{query}{after}"
            elif self.before_commit is not None and query == _COMMIT:
                self.before_commit()
        return await super().execute(query, *args, timeout=timeout)


def literal(text: str) -> str:
    """A text as SQL, whatever the connection's settings say of backslashes."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
