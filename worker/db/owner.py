"""Who may use an attempt's session: the task that runs the job's function, and no other."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, TypeAlias

from worker.core.errors import SessionShared
from worker.db.transitions import Held

Runner: TypeAlias = "asyncio.Task[Any] | threading.Thread"

_INSTEAD = (
    "a session serves one task at a time: await one after the other, or give each task a session of its own, which"
    ' commits by itself, with `async with ctx["sessions"].begin() as own:`, and pass it ids, not objects; a time limit'
    " is `async with asyncio.timeout(…):`, for asyncio.shield, and in Python 3.11 asyncio.wait_for, runs what it is"
    " given in a new task"
)
_INSTEAD_OF_A_FINALISER = (
    "the job left an async generator before its end, and asyncio closes such a one in a task of its own; close it in"
    " the job: `async with contextlib.aclosing(generator) as rows:` around the `async for`"
)
_INSTEAD_OF_A_THREAD = (
    "a session cannot be used in a thread; call sync code with `await session.run_sync(fn)`, or pass the thread what"
    " it needs as plain values"
)
_INSTEAD_OF_OUTLIVING = (
    "the attempt has ended and its session with it; a task that a job starts must end before the job does: await it,"
    " or use asyncio.TaskGroup"
)

# What aclose() of an async generator returns; Python has no public name for its type.
_ACLOSE = "async_generator_athrow"


def runner() -> Runner:
    """The task in which this code runs; outside of tasks, the thread."""
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no event loop runs here
        return threading.current_thread()


class Owner:
    """The one task that may use a session, and the first use by another.

    Args:
        task: the task.
        held: the job that it runs, for messages.

    """

    __slots__ = ("_held", "_loop", "_task", "_thread", "shared")

    def __init__(self, task: asyncio.Task[Any] | None, held: Held | None = None) -> None:
        self._held = held
        self._task = task
        self._loop = None if task is None else task.get_loop()
        self._thread = threading.get_ident()
        self.shared: SessionShared | None = None

    def require(self, *, ended: bool) -> None:
        """Raise `SessionShared` in any other task; the first is kept, for the job may never hear of it."""
        # With its loop given, current_task() makes no system call, which Python 3.11 does to find it.
        if threading.get_ident() == self._thread and asyncio.current_task(self._loop) is self._task:
            return
        user = runner()
        job = "a job" if self._held is None else f"job {self._held.job_id}"
        error = SessionShared(job, _shown(self._task), _shown(user), _advice(user, ended=ended))
        self.shared = self.shared or error
        raise error


def _advice(user: Runner, *, ended: bool) -> str:
    if isinstance(user, asyncio.Task) and type(user.get_coro()).__name__ == _ACLOSE:
        return _INSTEAD_OF_A_FINALISER
    if ended:
        return _INSTEAD_OF_OUTLIVING
    return _INSTEAD if isinstance(user, asyncio.Task) else _INSTEAD_OF_A_THREAD


def _shown(runner: Runner | None) -> str:
    if runner is None:
        return "no task"
    if isinstance(runner, threading.Thread):
        return f"thread {runner.name!r}"
    what = getattr(runner.get_coro(), "__qualname__", None)
    return f"task {runner.get_name()!r}" + (f" (runs {what})" if what else "")
