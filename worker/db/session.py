"""The session of an attempt: it joins the attempt's transaction lazily, and serves one task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from worker.db.lazy import refuse_lazy_load
from worker.db.transaction import ATTEMPT, AttemptTransaction, guard

T = TypeVar("T")


class AttemptSession(Session):
    """The session of an attempt; without one, an ordinary session on its own engine."""

    attempt: AttemptTransaction | None = None
    """The transaction to join, handed in by `info` when the session is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attempt = self.info.get(ATTEMPT)

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """The attempt's connection, taken now if this is the first statement."""
        refuse_lazy_load()
        attempt = self.attempt
        if attempt is None:
            return super().get_bind(*args, **kwargs)
        attempt.require_owner()
        attempt.lazy_loads.note(kwargs.get("clause"))
        return attempt.connection()

    def flush(self, *args: Any, **kwargs: Any) -> None:
        """Flush as any session does; a lazy load does it first, and must not fail halfway for want of a greenlet."""
        refuse_lazy_load()
        self.require_owner()
        super().flush(*args, **kwargs)

    def close(self) -> None:
        """Close as any session does: what was not committed is rolled back."""
        self.require_owner()
        self.end()

    def end(self) -> None:
        """Close for the worker, whichever task it does so in."""
        self._leave_uncommitted()
        super().close()

    def reset(self) -> None:
        """Reset as any session does: what was not committed is rolled back."""
        self.require_owner()
        self._leave_uncommitted()
        super().reset()

    def require_owner(self) -> None:
        """Refuse an attempt's session to every task but the one that runs the job."""
        if self.attempt is not None:
            self.attempt.require_owner()

    def _leave_uncommitted(self) -> None:
        # A session that joined rolls nothing back by itself when it is closed.
        if self.attempt is not None and self.in_transaction():
            super().rollback()


def _for_its_owner(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(Session, name))
    def guarded(session: AttemptSession, *args: Any, **kwargs: Any) -> Any:
        session.require_owner()
        return getattr(super(AttemptSession, session), name)(*args, **kwargs)  # a user's class may override it

    return guarded


# Statements are guarded in `get_bind`, what is added in `before_attach`; these may do their work without either.
for _name in (
    "begin",
    "commit",
    "delete",
    "delete_all",
    "expire_all",
    "get",
    "invalidate",
    "refresh",
    "rollback",
):
    setattr(AttemptSession, _name, _for_its_owner(_name))


class JobSession(AsyncSession):
    """The session as jobs have it: an attempt's is closed in the job's own task, where SQLAlchemy starts another."""

    async def __aexit__(self, type_: Any, value: Any, traceback: Any) -> None:
        """Close; an attempt's needs no shield, for the worker closes it in any case."""
        if ATTEMPT in self.info:
            await self.close()
        else:
            await super().__aexit__(type_, value, traceback)

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """The engine, as an ordinary session's: async code can take no connection here, and sends nothing on it."""
        attempt = self.info.get(ATTEMPT)
        return super().get_bind(*args, **kwargs) if attempt is None else attempt.engine

    async def run_sync(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run sync code, in which attributes may load lazily: an attempt counts how often they do."""
        attempt = self.info.get(ATTEMPT)
        if attempt is None:
            return await super().run_sync(fn, *args, **kwargs)
        with attempt.lazy_loads.counted():
            return await super().run_sync(fn, *args, **kwargs)


class UnopenedSession(JobSession):
    """The session of a job that may never use it: SQLAlchemy's own is made at its first use."""

    def __init__(self, bind: AsyncEngine, **options: Any) -> None:
        self._unopened: tuple[AsyncEngine, dict[str, Any]] | None = (bind, options)

    def __getattr__(self, name: str) -> Any:
        """Called for what only an opened session has."""
        unopened = self.__dict__.get("_unopened")
        if unopened is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        bind, options = unopened
        self._unopened = None
        super().__init__(bind, **options)
        return getattr(self, name)


def is_opened(session: AsyncSession) -> bool:
    """Whether anything was done with this session."""
    return not isinstance(session, UnopenedSession) or session._unopened is None


def make_sessions(engine: AsyncEngine, info: dict[str, Any]) -> async_sessionmaker[AsyncSession]:
    """The one factory of a worker; `sessions(info=joining(attempt))` makes a session that joins an attempt.

    Args:
        engine: the jobs' engine.
        info: what the `info` of every session holds besides.

    """
    guard(engine)
    return async_sessionmaker(
        engine,
        class_=UnopenedSession,
        sync_session_class=AttemptSession,
        expire_on_commit=False,
        join_transaction_mode="rollback_only",
        info=info,
    )


def joining(attempt: AttemptTransaction) -> dict[str, Any]:
    """What `info` a session needs to join this attempt."""
    return {ATTEMPT: attempt}


# Before all others: what was enqueued is published only once nothing can take the commit back.
@event.listens_for(AttemptSession, "after_commit", insert=True)
def _keep(session: AttemptSession) -> None:
    if session.attempt is not None and not session.in_nested_transaction():
        session.attempt.keep()


@event.listens_for(AttemptSession, "before_attach")
def _attach(session: AttemptSession, _instance: Any) -> None:
    session.require_owner()
