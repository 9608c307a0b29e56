"""Lazy loads: refused in async code, where nothing can wait for them, and counted inside `run_sync`."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import InstrumentedAttribute, MapperProperty, RelationshipProperty, Session
from sqlalchemy.orm.loading import _PostLoad
from sqlalchemy.util.concurrency import in_greenlet

from worker.core.errors import LazyLoadRefused

_READS: Final[CodeType] = InstrumentedAttribute.__get__.__code__
_WRITES: Final[CodeType] = InstrumentedAttribute.__set__.__code__
_EXECUTES: Final[CodeType] = Session._execute_internal.__code__
_LOADS_BEHIND: Final[CodeType] = _PostLoad.invoke.__code__


def refuse_lazy_load() -> None:
    """Raise `LazyLoadRefused` where reading an attribute led here and nothing can wait; elsewhere do nothing."""
    if in_greenlet():
        return
    frame = _attribute_frame(sys._getframe(2))
    if frame is not None:
        prop, obj = frame.f_locals["self"].property, frame.f_locals["instance"]
        raise LazyLoadRefused(str(prop), _line_outside_sqlalchemy(frame), _instead(prop, obj))


class LazyLoads:
    """How often sync code of one attempt has loaded each attribute lazily."""

    __slots__ = ("_counting", "_counts")

    def __init__(self) -> None:
        self._counts: dict[MapperProperty[Any], int] = {}
        self._counting = False

    def __bool__(self) -> bool:
        return bool(self._counts)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count while the block lasts."""
        before, self._counting = self._counting, True
        try:
            yield
        finally:
            self._counting = before

    def note(self, statement: Any) -> None:
        """Called before each statement of the session: the event for it would prepare every one twice."""
        if self._counting and getattr(statement, "is_select", False):
            frame = _attribute_frame(sys._getframe(2), within_one_statement=True)
            if frame is not None:  # else it is asked for, a refresh() or a cascade
                prop = frame.f_locals["self"].property
                self._counts[prop] = self._counts.get(prop, 0) + 1

    @property
    def total(self) -> int:
        """How many there were."""
        return sum(self._counts.values())

    @property
    def by_attribute(self) -> dict[str, int]:
        """How many of each, as "Order.lines"; the most frequent first."""
        return {
            str(prop): self._counts[prop] for prop in sorted(self._counts, key=self._counts.__getitem__, reverse=True)
        }

    @property
    def remedy(self) -> str:
        """What would have loaded the most frequent one without a statement of its own for each object."""
        return _eagerly(max(self._counts, key=lambda prop: self._counts[prop]))


def _attribute_frame(start: FrameType, *, within_one_statement: bool = False) -> FrameType | None:
    """Where an attribute is read that led to this frame; within one statement: not by its flush or its eager loads."""
    frame: FrameType | None = start
    statements = 0
    while frame is not None:
        code = frame.f_code
        if code is _READS:
            return frame
        if code is _WRITES:
            return None if _is_users(start, frame) else frame
        statements += code is _EXECUTES
        if within_one_statement and (statements > 1 or code is _LOADS_BEHIND):
            return None
        frame = frame.f_back
    return None


def _is_users(frame: FrameType, writes: FrameType) -> bool:
    """Whether it is a query of the user's own, which a validator or an event makes while an attribute is set."""
    while frame is not writes:
        if not _is_of_sqlalchemy(frame) and not isinstance(frame.f_locals.get("self"), Session):
            return True
        assert frame.f_back is not None
        frame = frame.f_back
    return False


def _is_of_sqlalchemy(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("sqlalchemy.")


def _line_outside_sqlalchemy(frame: FrameType) -> str:
    user: FrameType | None = frame
    while user is not None and _is_of_sqlalchemy(user):
        user = user.f_back
    user = user or frame
    source = linecache.getline(user.f_code.co_filename, user.f_lineno, user.f_globals).strip()
    return f"{user.f_globals.get('__name__')}, line {user.f_lineno}" + (f": `{source}`" if source else "")


def _instead(prop: MapperProperty[Any], obj: object) -> str:
    awaited = f"`await obj.awaitable_attrs.{prop.key}`"
    if not isinstance(obj, AsyncAttrs):
        awaited = f"give the base of {type(obj).__name__} sqlalchemy.ext.asyncio.AsyncAttrs and write {awaited}"
    else:
        awaited = f"write {awaited}"
    return f"{awaited}, or {_eagerly(prop)}"


def _eagerly(prop: MapperProperty[Any]) -> str:
    if isinstance(prop, RelationshipProperty):
        return f"load it with the objects: .options(selectinload({prop}))"
    if getattr(prop, "deferred", False):
        return f"load it with the objects: .options(undefer({prop}))"
    return "read it before it expires, as by a commit or rollback, or call session.refresh(obj)"
