"""One attempt's database side: a session of its own, made when first asked for, in one transaction of the worker's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from worker.core.errors import LeaseLost, TransactionAborted
from worker.core.options import Rules
from worker.core.remarks import NOTHING, Remarks
from worker.db import transitions
from worker.db.failures import is_aborted, is_lease_lost
from worker.db.own_commits import OwnCommits
from worker.db.owner import Owner
from worker.db.read_only import ReadOnly
from worker.db.session import AttemptSession, is_opened, joining
from worker.db.transaction import AttemptTransaction
from worker.db.transitions import Held
from worker.flow.after_commit import OUTBOX, Outbox
from worker.flow.publish import Publishable
from worker.flow.work import Work
from worker.observe.events import CommitSending, emit

T = TypeVar("T")

_CLOSE_LIMIT: Final = timedelta(seconds=10)

_ABORTED = (
    "a statement failed and the job went on without rolling back, so nothing it wrote can be kept; call"
    " session.rollback() after the error, or run the statement inside `async with session.begin_nested()`"
)


_NO_FOLLOW_UPS = (
    "this job is read_only, and a follow-up is something it writes; enqueue it where the result is used, or leave"
    " read_only out of @job"
)

_ANY_RULES: Final = Rules()


class Attempt:
    """The session and the transaction of one run; neither exists for a job that does not ask for them.

    Args:
        work: the worker's parts.
        held: the job, for a definition whose commits are its own, and for messages.
        rules: the definition's options.
        task: the task that runs the job, which alone may use the session; None: the one in which this is called.

    """

    def __init__(
        self,
        work: Work,
        held: Held | None = None,
        rules: Rules = _ANY_RULES,
        task: asyncio.Task[None] | None = None,
    ) -> None:
        self._work = work
        self._session: AsyncSession | None = None
        self._closed = False
        self.transaction = _transaction(work, held, rules)
        self.transaction.owner = Owner(task or asyncio.current_task(), held)
        self._outbox = Outbox(_NO_FOLLOW_UPS if rules.read_only else None)

    def session(self) -> AsyncSession:
        """The attempt's session, made at the first call."""
        if self._session is None:
            info = joining(self.transaction)
            if isinstance(self.transaction, OwnCommits):
                # Hints leave after each commit, as anybody's; a transaction that a bare statement began is its own too.
                self._session = self._work.sessions(info=info, join_transaction_mode="control_fully")
            else:
                info[OUTBOX] = self._outbox
                self._session = self._work.sessions(info=info)
        return self._session

    @property
    def used(self) -> bool:
        """Whether the job did anything with its session."""
        return self._session is not None and is_opened(self._session)

    @property
    def hints(self) -> list[Publishable]:
        """The hints of what the job enqueued, to be published once its success is committed."""
        return self._outbox.hints

    async def commit_success(self, held: Held, result: str, remarks: Remarks = NOTHING) -> bool:
        """Commit the success and the result together with all the job wrote; False when there is nothing to commit.

        Raises:
            LeaseLost: somebody else holds the job.
            SessionShared: another task had used the session.
            SessionLeftOpen: the job left something open that it took beside its session.
            TransactionAborted: a statement failed and nobody rolled back.
            TransactionEscaped: the job ended the transaction behind its session's back.

        """
        self.transaction.require_orderly()
        if not self.used:
            return False
        return await self._in_greenlet(self._commit_success, held, result, remarks)

    def _commit_success(self, session: AttemptSession, held: Held, result: str, remarks: Remarks) -> bool:
        try:
            connection = self.transaction.settle(session)
            if connection is None:
                return False
            emit(CommitSending(job=held.job_id))
            if self.transaction.takes_along and not remarks.notable:
                self.transaction.commit(transitions.success_of(held, result))
            elif transitions.succeed(connection, held, result, remarks):
                self.transaction.commit()
            else:
                raise _lease_lost(held)
        except PendingRollbackError as error:
            raise TransactionAborted(_ABORTED) from error
        except Exception as error:
            if is_aborted(error):
                raise TransactionAborted(_ABORTED) from error
            if is_lease_lost(error):
                raise _lease_lost(held) from error
            raise
        with contextlib.suppress(Exception):  # the success stands
            self._close(session)
        return True

    async def close(self) -> None:
        """Roll back what was not committed and give the connection back, or throw it away where that fails."""
        for connection in self.transaction.left_open():  # others wait for its place in the pool
            with contextlib.suppress(Exception):
                await self.in_greenlet(connection.invalidate)
        if not self.used:
            self.transaction.close()  # a task that outlives its job must not open it now
            return
        if self._closed:
            return
        # A connection that cannot be rolled back says nothing about the job, whose error or success stands.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_CLOSE_LIMIT.total_seconds()):
                await self._in_greenlet(self._close)

    def _close(self, session: AttemptSession) -> None:
        self._closed = True
        try:
            session.end()
        except BaseException:
            self.transaction.discard()
            raise
        finally:
            self.transaction.close()

    async def discard(self) -> None:
        """Throw the connection away."""
        await self.in_greenlet(self.transaction.discard)

    async def in_greenlet(self, call: Callable[[], T]) -> T:
        """Call sync code that may use the attempt's connection."""
        return await self._in_greenlet(lambda _: call())

    async def _in_greenlet(self, call: Callable[..., T], *args: Any) -> T:
        # Not as a job does: what is loaded here is no lazy load of the job's.
        return await AsyncSession.run_sync(self.session(), call, *args)


def _transaction(work: Work, held: Held | None, rules: Rules) -> AttemptTransaction:
    engine = work.jobs_engine.sync_engine
    if rules.read_only:
        return ReadOnly(engine, rules.isolation)
    if rules.commits == "own" and held is not None:
        return OwnCommits(engine, rules.isolation, partial(_only_while_held, held=held))
    return AttemptTransaction(engine, rules.isolation)


def _only_while_held(connection: Connection, held: Held) -> None:
    if not transitions.hold(connection, held):
        raise _lease_lost(held)


def _lease_lost(held: Held) -> LeaseLost:
    return LeaseLost(f"job {held.job_id} is held by somebody else")
