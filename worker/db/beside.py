"""What a job takes from the jobs' pool beside its own session, and has not given back when it returns."""

from __future__ import annotations

import asyncio
import weakref
from contextvars import ContextVar
from typing import Any

from sqlalchemy import PoolProxiedConnection, event
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.db.owner import Runner, runner

_TAKEN_BY = "exarq.taken_by"

# A task that a job starts inherits it, so that what it takes is known to be the job's.
_current: ContextVar[Beside | None] = ContextVar("exarq.beside", default=None)


class Beside:
    """The connections that one attempt has taken, its session's own among them."""

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken: dict[Any, tuple[weakref.ref[PoolProxiedConnection], Runner]] = {}
        _current.set(self)

    def left_open(self, own: PoolProxiedConnection | None) -> list[PoolProxiedConnection]:
        """Those not given back, but for `own` and for what a task that still runs may be about to give back."""
        if not self._taken:
            return []
        me = runner()
        return [
            connection
            for taken, by in self._taken.values()
            if (connection := taken()) is not None and connection is not own and (by is me or _has_ended(by))
        ]


def watch(engine: AsyncEngine) -> None:
    """Note from here on which attempt takes a connection of this engine."""
    event.listen(engine.sync_engine, "checkout", _taken)
    event.listen(engine.sync_engine, "checkin", _given_back)


def _taken(_connection: Any, record: Any, proxy: PoolProxiedConnection) -> None:
    beside = _current.get()
    if beside is not None:
        beside._taken[record] = weakref.ref(proxy), runner()
        record.record_info[_TAKEN_BY] = beside


def _given_back(_connection: Any, record: Any) -> None:
    beside = record.record_info.pop(_TAKEN_BY, None)
    if beside is not None:
        beside._taken.pop(record, None)


def _has_ended(runner: Runner) -> bool:
    return runner.done() if isinstance(runner, asyncio.Task) else not runner.is_alive()
