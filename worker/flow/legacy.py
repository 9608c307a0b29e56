"""Legacy: a `def` job runs unchanged, with an ordinary Session in the attempt's transaction."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

from sqlalchemy.ext.asyncio import AsyncSession

from worker.core.context import JobContext, be_current
from worker.core.errors import DefinitionError, ExarqError
from worker.flow.blocked import charged
from worker.flow.holdings import Run


async def call(run: Run, session: AsyncSession, context: JobContext, fn: Callable[..., Any]) -> Any:
    """Call the function in a greenlet: where one of its statements waits, the loop goes on.

    A cancellation is raised inside the statement that waits, or in the next one.
    """
    session.sync_session.expire_on_commit = True  # as sessions do that were made for such code
    with be_current(context):
        result = await charged(run, session.run_sync(fn))
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise DefinitionError(
            f"{run.claimed.name} is a `def` and returned {type(result).__name__}, which nobody awaits;"
            " write `async def` with session: AsyncSession"
        )
    return result


def no_async_session() -> NoReturn:
    """What a `def` job finds at `current_job().session`."""
    raise ExarqError("a `def` job writes through the Session it was given, its first parameter; use that")
