"""The transaction of an attempt that writes nothing."""

from __future__ import annotations

import re
from typing import Final

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from worker.core.errors import TransactionEscaped
from worker.db.isolation import isolation_of
from worker.db.transaction import AttemptTransaction

_WROTE: Final = "the job is read_only and has turned its transaction into one that writes; leave SET TRANSACTION out"

_MAY_MAKE_IT_WRITE: Final = re.compile(r"\bREAD\s+WRITE\b|\btransaction_read_only\b", re.IGNORECASE)


class ReadOnly(AttemptTransaction):
    """A transaction in which PostgreSQL refuses each write; the success is stored after it."""

    def __init__(self, engine: Engine, isolation: str | None = None) -> None:
        super().__init__(engine, isolation, read_only=True)
        self._isolation = isolation
        self._may_write = False

    def before_statement(self, statement: str) -> None:
        """Remember a statement that may let the transaction write, so that it is asked at the end whether it did."""
        super().before_statement(statement)
        self._may_write = self._may_write or _MAY_MAKE_IT_WRITE.search(statement) is not None

    def settle(self, session: Session) -> None:
        """Nothing is to be committed, but only its COMMIT says that what a serializable transaction read was true.

        Raises: `TransactionEscaped` when it could write, for nothing of that is kept; besides as any settling.
        """
        session.commit()
        if not self.taken:
            return
        serializable = isolation_of(self.engine, self._isolation) == "SERIALIZABLE"
        if not (serializable or self._may_write):
            return
        connection = self.ready_to_complete()
        if connection.execute(text("SHOW transaction_read_only")).scalar_one() != "on":
            raise TransactionEscaped(_WROTE)
        if serializable:
            self.commit()
