"""One step for both kinds of session: taken at once in a sync one, in an async one when it is awaited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session

P = ParamSpec("P")
T = TypeVar("T")

SyncSession: TypeAlias = Session | scoped_session[Any]
"""A sync session, or the registry of a thread's, as Flask-SQLAlchemy has it."""


def in_session(
    session: AsyncSession | SyncSession, step: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
) -> Any:
    """What the step gives, of a sync session; of an async one, a coroutine of it.

    Raises: `TypeError` for what is no session.
    """
    if isinstance(session, AsyncSession):
        return session.run_sync(step, *args, **kwargs)
    sync = session() if isinstance(session, scoped_session) else session
    if not isinstance(sync, Session):
        raise TypeError(_no_session(sync))
    return step(sync, *args, **kwargs)


def _no_session(given: object) -> str:
    kind = type(given).__name__
    how = (
        "async with client.sessions.begin() as session:"
        if kind == "Client"
        else "async with sessions.begin() as session:"
    )
    return f"the first argument is the session in whose transaction this takes place, not a {kind}: `{how}`"
