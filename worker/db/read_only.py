"""The transaction of an attempt that writes nothing."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from worker.core.errors import TransactionEscaped
from worker.db.transaction import AttemptTransaction

_WROTE: Final = "the job is read_only and has turned its transaction into one that writes; leave SET TRANSACTION out"


class ReadOnly(AttemptTransaction):
    """A transaction in which PostgreSQL refuses each write; the success is stored after it."""

    def __init__(self, engine: Engine, isolation: str | None = None) -> None:
        super().__init__(engine, isolation, read_only=True)
        self._serializable = isolation == "SERIALIZABLE"

    def settle(self, session: Session) -> None:
        """Nothing is to be committed, but only its COMMIT says that what a serializable transaction read was true."""
        session.commit()
        if self._serializable and self.taken:
            connection = self.ready_to_complete()
            if connection.execute(text("SHOW transaction_read_only")).scalar_one() != "on":
                raise TransactionEscaped(_WROTE)
            self.commit()
