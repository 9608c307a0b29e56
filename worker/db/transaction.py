"""The attempt's one transaction.

What a job calls commit becomes a savepoint of this transaction, what it calls rollback goes back to that savepoint.
The real COMMIT is the worker's, together with the completing UPDATE. Everything here is sync code that runs inside
SQLAlchemy's greenlet: inside the job's own statements, or under `AsyncSession.run_sync`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final, TypeGuard
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, PoolProxiedConnection, Transaction, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from worker.core.errors import DatabaseUnreachable, SessionLeftOpen, TransactionAborted, TransactionEscaped
from worker.db.beside import Beside, watch
from worker.db.driver import Driver
from worker.db.engine import RESET, RESET_KEY
from worker.db.failures import is_answer, is_away
from worker.db.lazy import LazyLoads
from worker.db.owner import Owner

ATTEMPT: Final = "exarq.attempt"
"""The key under which a session knows the attempt it serves."""

# Each alternative begins with another character and each comment has one reading: no input makes it search long.
_COMMENTS: Final = r"(?:[\s;]|--[^\n]*(?:\n|$)|/\*[^*]*\*+(?:[^/*][^*]*\*+)*/)*"
_TO_SAVEPOINT: Final = r"(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b)"
_NOTABLE: Final = re.compile(
    rf"{_COMMENTS}(?:(?P<stays>PREPARE\b(?!\s+TRANSACTION\b))|COMMIT|END|ABORT|PREPARE\s+TRANSACTION|ROLLBACK{_TO_SAVEPOINT})\b",
    re.IGNORECASE | re.DOTALL,
)

# What it was asked to tell a job that is gone by then, asyncpg would tell the next one.
_LISTENERS: Final = attrgetter("_listeners", "_log_listeners", "_query_loggers", "_termination_listeners")

_ESCAPED = (
    "the job ended its transaction by a COMMIT or ROLLBACK of its own; call commit() and rollback() of its session"
    " instead, which keep their meaning inside the attempt's transaction"
)


_LOST = (
    "the connection was lost, or a cancellation ended it, and with it went what the job had committed so far; the job"
    " cannot go on from there: let the error pass, so that it is run again"
)

_WENT_ON = (
    "the transaction went on after its COMMIT, for the job had begun another around it on the driver; leave BEGIN and"
    " asyncpg's transaction() out, the session begins its transactions by itself"
)

_OUTLIVED = "the attempt has ended and its session with it; nothing more can be done with it"


class AttemptTransaction:
    """One transaction on one connection, both taken at the first statement and never before.

    Its `owner` is set by who makes it.

    Args:
        engine: the jobs' engine.
        isolation: the transaction's isolation level; None takes the engine's.
        read_only: whether it may write nothing.

    """

    owner: Owner

    def __init__(self, engine: Engine, isolation: str | None = None, *, read_only: bool = False) -> None:
        self.engine = engine
        self._beside = Beside()
        self.lazy_loads = LazyLoads()
        self._options: dict[str, Any] = {}
        if isolation is not None:
            self._options["isolation_level"] = isolation
        if read_only:
            self._options["postgresql_readonly"] = True
        self._connection: Connection | None = None
        self._driver: Any = None  # of that connection, in the transaction that was begun last
        self._ours: Driver | None = None  # the same, where it is of our class
        self._root: Transaction | None = None
        self._escaped = False  # the job tried to end the transaction behind its session's back
        self._closed = False
        self._is_reset = False
        self._for_this_job_only = False  # no statement makes the connection as it was
        self._kept = False  # the job has called commit: from here on its rollback goes back to a savepoint
        self.commit_sent = False  # from here on only the row knows whether it took place
        self.backend_pid: int | None = None

    @property
    def taken(self) -> bool:
        """Whether a connection was taken, so that the completion belongs into its transaction."""
        return self._connection is not None

    def require_owner(self) -> None:
        """Refuse the session to every task but the one that runs the job, and to all once the attempt has ended.

        Raises: `SessionShared`, `TransactionEscaped`.
        """
        self.owner.require(ended=self._closed)
        if self._closed:
            raise TransactionEscaped(_OUTLIVED)

    def require_orderly(self) -> None:
        """Refuse a success when another task had used the session, or something taken beside it was left open.

        Raises: `SessionShared`, `SessionLeftOpen`.
        """
        if self.owner.shared is not None:
            raise self.owner.shared
        if left := self.left_open():
            raise SessionLeftOpen(len(left))

    def left_open(self) -> list[PoolProxiedConnection]:
        """What the job took from the pool beside its session and has not given back."""
        own = self._connection
        return self._beside.left_open(None if own is None or own.invalidated else own.connection)

    def connection(self) -> Connection:
        """The connection, inside the transaction; the session asks before each statement."""
        connection = self._begun()
        if self._kept and not connection.in_nested_transaction():
            connection.begin_nested()
        return connection

    def keep(self) -> None:
        """What the job wrote so far is what it calls committed: no later rollback of the job takes it back."""
        if self._connection is None or not self._connection.in_transaction():
            return
        self._kept = True
        while savepoint := self._connection.get_nested_transaction():
            savepoint.commit()

    def settle(self, session: Session) -> Connection | None:
        """Flush what the job left pending; the connection to complete on, None where nothing is to be committed.

        Raises: as `ready_to_complete`.
        """
        session.commit()
        return self.ready_to_complete() if self.taken else None

    def ready_to_complete(self) -> Connection:
        """The connection, while its transaction is still the one we began.

        Raises: `TransactionEscaped` when the job ended it behind the session's back. Asks asyncpg, not the server.
        """
        connection = self._begun()
        self._know_driver(connection)
        if _has_begun(connection) and not self._driver.is_in_transaction():
            raise TransactionEscaped(_ESCAPED)
        return connection

    @property
    def takes_along(self) -> bool:
        """Whether the completion may go in one message with the COMMIT: not where no statement has sent the BEGIN."""
        connection = self._connection
        if connection is None or not _has_begun(connection):
            return False
        return self._ours is not None and self._ours.speaks_utf8

    def commit(self, completion: str = "") -> None:
        """The one COMMIT of the attempt.

        Args:
            completion: what goes before it in the same message, for a connection that takes it along.

        Raises: `TransactionEscaped` when it ended no transaction; what a refused completion raises, then nothing was
            committed and `commit_sent` is False.

        """
        self.commit_sent = True
        try:
            took_along = self._end(self._connection, self._commit, before=completion)
        except Exception as error:
            connection = self._connection
            if connection is not None and is_answer(error) and self._is_in_transaction():
                self.commit_sent = False  # also a COMMIT that fails would have ended it: this one was not reached
                # SQLAlchemy takes the transaction for ended, and would send no ROLLBACK any more.
                dbapi_of(connection).run_async(lambda driver: driver.execute("ROLLBACK"))
            raise
        self.require_ended()
        if completion and not took_along:
            raise TransactionEscaped(_ESCAPED)

    def before_statement(self, statement: str) -> None:
        """Called before each statement on the connection, whoever sends it: the job may have passed it on."""
        self.require_owner()
        if found := _NOTABLE.match(statement):
            if found["stays"]:
                self.keep_from_others()
            else:
                self.refuse_foreign_end()

    def refuse_foreign_end(self) -> None:
        """Keep a job from ending the transaction without the completion; from here on its attempt can only fail."""
        if not self.commit_sent:
            self._escaped = True
            raise TransactionEscaped(_ESCAPED)

    def keep_from_others(self) -> None:
        """The job does what no reset undoes but one that costs every job: the next one gets another connection."""
        self._for_this_job_only = True

    def close(self) -> None:
        """Roll back what was not committed and give the connection back as clean as it came."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            self._know_driver(connection)
            self._end(connection, connection.rollback)
            if self._for_this_job_only or (not connection.invalidated and _is_dirty(self._driver)):
                connection.invalidate()
            if not connection.invalidated:
                if self._ours is not None:
                    self._ours.before_commit = None
                if not self._is_reset and (reset := _reset_of(connection)):
                    dbapi_of(connection).run_async(lambda driver: driver.execute(reset))
        except BaseException as error:  # a connection that was not cleaned is not used again
            connection.invalidate()
            if not isinstance(error, Exception):
                raise
        finally:
            connection.close()
            _serving.pop(connection, None)  # the attempt holds its connection, and would keep itself there

    def discard(self) -> None:
        """Throw the connection away: nobody knows what state its server side is in."""
        if self._connection is not None and not self._connection.invalidated:
            self._connection.invalidate()

    def require_ended(self) -> None:
        """Refuse to take for a COMMIT what has only released a savepoint.

        Raises: `TransactionEscaped`.
        """
        if self._is_in_transaction():
            raise TransactionEscaped(_WENT_ON)

    def _is_in_transaction(self) -> bool:
        connection = self._connection
        return connection is not None and not connection.invalidated and bool(self._driver.is_in_transaction())

    def _begun(self) -> Connection:
        if self._escaped:
            raise TransactionEscaped(_ESCAPED)
        if self._connection is None:
            self._connection = _connect(self.engine)
            _serving[self._connection] = self
        if self._kept and self._connection.invalidated:
            raise TransactionAborted(_LOST)
        if not self._connection.in_transaction():
            self._hold(self._connection)
            if self._options:  # part of the BEGIN, and undone when the connection goes back
                self._connection.execution_options(**self._options)
            self._begin(self._connection)
        return self._connection

    def _hold(self, connection: Connection) -> None:
        """Know the driver's connection, and keep everybody else from ending its transaction."""
        self._driver = driver = connection.connection.driver_connection
        self._ours = driver if _is_ours(driver) else None
        self.backend_pid = self._driver.get_server_pid()
        self._watch_commits(connection)

    def _know_driver(self, connection: Connection) -> None:
        """Where SQLAlchemy has replaced a lost connection by itself, hold the new one."""
        if not connection.invalidated and connection.connection.driver_connection is not self._driver:
            self._hold(connection)

    def _watch_commits(self, connection: Connection) -> None:
        if self._ours is not None:
            self._ours.before_commit = self.refuse_foreign_end
        else:
            event.listen(connection, "commit", self._before_commit)

    def _before_commit(self, _connection: Connection) -> None:
        self.refuse_foreign_end()

    def _commit(self) -> None:
        assert self._root is not None
        self._root.commit()

    def _end(self, connection: Connection | None, end: Callable[[], None], *, before: str = "") -> bool:
        """End the transaction for good; `before`, and the resets after it, go along with that where they can."""
        if connection is None or connection.invalidated or self._ours is None:
            end()
            return False
        took_along = self._ours.end_with(end, before=before, after=_reset_of(connection))
        self._is_reset = self._is_reset or took_along
        return took_along

    def _begin(self, connection: Connection) -> None:
        if self._kept:
            raise TransactionEscaped(_ESCAPED)
        self._root = connection.begin()


_serving: WeakKeyDictionary[Connection, AttemptTransaction] = WeakKeyDictionary()


def guard(engine: AsyncEngine) -> None:
    """Watch the connections of this engine: who takes them, and that nobody ends an attempt's transaction on them."""
    # Events of the dialect: one of the engine would cost each connection taken from it a dispatch of its own.
    dialect = engine.sync_engine.dialect
    event.listen(dialect, "do_execute", _before_statement)
    event.listen(dialect, "do_executemany", _before_statement)
    event.listen(dialect, "do_execute_no_params", _before_statement_without_parameters)
    watch(engine)


def _before_statement(_cursor: Any, statement: str, _parameters: Any, context: Any) -> None:
    attempt = _serving.get(context.root_connection)
    if attempt is not None:
        attempt.before_statement(statement)


def _before_statement_without_parameters(cursor: Any, statement: str, context: Any) -> None:
    _before_statement(cursor, statement, None, context)


def _connect(engine: Engine) -> Connection:
    try:
        return engine.connect()
    except Exception as error:
        if is_away(error):
            raise DatabaseUnreachable(f"PostgreSQL does not answer: {type(error).__name__}: {error}") from error
        raise


def _reset_of(connection: Connection) -> str:
    """What makes it as it was before the attempt."""
    return str(connection.info.get(RESET_KEY, RESET))


def dbapi_of(connection: Connection) -> Any:
    """SQLAlchemy's own adapter of the driver's connection."""
    return connection.connection.dbapi_connection


def _has_begun(connection: Connection) -> bool:
    """Whether SQLAlchemy has sent the BEGIN, which it does with the first statement."""
    return dbapi_of(connection)._transaction is not None


def _is_ours(driver: Any) -> TypeGuard[Driver]:
    return issubclass(type(driver), Driver)  # asyncpg's own isinstance() takes any connection for one of any class


def _is_dirty(driver: Any) -> bool:
    """Whether no reset helps: in a transaction, which SQLAlchemy believes ended, a reset is rolled back."""
    return any(_LISTENERS(driver)) or driver.is_in_transaction() or driver._top_xact is not None
