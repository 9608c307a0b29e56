"""Lazy loads: refused in async code, where nothing can wait for them, and counted inside `run_sync`."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import InstrumentedAttribute, MapperProperty, ORMExecuteState, RelationshipProperty, Session
from sqlalchemy.util.concurrency import in_greenlet

from worker.core.errors import LazyLoadRefused

_READS_OR_WRITES: Final[tuple[CodeType, ...]] = (
    InstrumentedAttribute.__get__.__code__,
    InstrumentedAttribute.__set__.__code__,
)


def refuse_lazy_load() -> None:
    """Raise `LazyLoadRefused` where reading an attribute led here and nothing can wait; elsewhere do nothing."""
    if in_greenlet():
        return
    frame = _attribute_frame()
    if frame is not None:
        prop, obj = frame.f_locals["self"].property, frame.f_locals["instance"]
        raise LazyLoadRefused(str(prop), _line_outside_sqlalchemy(frame), _instead(prop, obj))


class LazyLoads:
    """How often sync code of one attempt has loaded each attribute lazily."""

    __slots__ = ("_counting", "_counts", "_listens")

    def __init__(self) -> None:
        self._counts: dict[MapperProperty[Any], int] = {}
        self._counting = False
        self._listens = False

    def __bool__(self) -> bool:
        return bool(self._counts)

    @contextmanager
    def counted(self, session: Session) -> Iterator[None]:
        """Count while the block lasts."""
        if not self._listens:  # on this one session: where the event is heard, every statement is prepared twice
            event.listen(session, "do_orm_execute", self._note)
            self._listens = True
        before, self._counting = self._counting, True
        try:
            yield
        finally:
            self._counting = before

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

    def _note(self, state: ORMExecuteState) -> None:
        if self._counting and state.is_select and (state.is_column_load or state.lazy_loaded_from is not None):
            frame = _attribute_frame()
            if frame is not None:  # else it is a refresh() or a cascade
                prop = frame.f_locals["self"].property
                self._counts[prop] = self._counts.get(prop, 0) + 1


def _attribute_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in _READS_OR_WRITES:
        frame = frame.f_back
    return frame


def _line_outside_sqlalchemy(frame: FrameType) -> str:
    user: FrameType | None = frame
    while user is not None and str(user.f_globals.get("__name__")).startswith("sqlalchemy."):
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
