"""The transactions of an attempt whose commits are its own: real ones, each behind the fence."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session

from worker.db.transaction import AttemptTransaction, dbapi_of


class OwnCommits(AttemptTransaction):
    """Each commit of the session is a real one, made only while the attempt holds its job.

    Args:
        engine: the jobs' engine.
        isolation: the transactions' isolation level; None takes the engine's.
        fence: called inside the transaction before each COMMIT; locks the job's row, raises when the job is lost.

    """

    def __init__(self, engine: Engine, isolation: str | None, fence: Callable[[Connection], None]) -> None:
        super().__init__(engine, isolation)
        self._fence = fence
        self._last: Session | None = None

    def connection(self) -> Connection:
        """The connection; the session begins and ends its own transactions on it."""
        return self._begun()

    def keep(self) -> None:
        """The job has committed: nothing can take that back, nor hold it up."""
        # A session that joined a savepoint of the connection's has only released that.
        if self._connection is not None and self._connection.in_transaction():
            self._connection.commit()

    def settle(self, session: Session) -> Connection | None:
        """Flush what the job left pending; the completion is part of its last transaction, or one of its own."""
        session.flush()
        if not self.taken:
            return None
        self._last = session
        session.connection()
        return self.ready_to_complete()

    def _watch_commits(self, connection: Connection) -> None:
        event.listen(connection, "commit", self._before_commit)  # the fence is a statement, before the COMMIT begins

    def _before_commit(self, connection: Connection) -> None:
        """A COMMIT of the job's own takes place only while the attempt holds the job."""
        if self.commit_sent:
            return
        try:
            self._fence(connection)
        except Exception:  # SQLAlchemy takes the transaction for ended, and would send no ROLLBACK any more
            if not connection.invalidated:
                dbapi_of(connection).rollback()
            raise

    def _commit(self) -> None:
        assert self._last is not None
        self._last.commit()

    def _begin(self, connection: Connection) -> None:
        pass
