"""One step for both kinds of session: taken at once in a sync one, in an async one when it is awaited."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session

P = ParamSpec("P")
T = TypeVar("T")
Out = TypeVar("Out", covariant=True)

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


class ForBoth(Protocol[P, Out]):
    """A function of a session of either kind."""

    @overload
    def __call__(self, session: AsyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Out]: ...
    @overload
    def __call__(self, session: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Out: ...
    def __call__(self, session: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Take the step."""


def for_both(step: Callable[Concatenate[Session, P], T]) -> ForBoth[P, T]:
    """The step for both kinds of session: awaited with an async one."""

    @functools.wraps(step)
    def taken(session: AsyncSession | SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return in_session(session, step, *args, **kwargs)

    return cast("ForBoth[P, T]", taken)
