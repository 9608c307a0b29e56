"""Wait for one job on the command line: its result on stdout, how far it is on stderr where people look on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from worker.cli.output import note
from worker.db.failures import is_transient
from worker.flow.handle import Handle
from worker.flow.waiting import look

NOT_IN_TIME: Final = 3
"""The exit code where the job had not ended in time."""

_LOOK_EVERY: Final = timedelta(seconds=1)


async def result_shown(engine: AsyncEngine, handle: Handle, seconds: float) -> Any:
    """The job's result; raises what `Handle.result` does."""
    note(f"waiting for {handle.name} {handle.id}")
    with _progress(engine, handle.id):
        return await handle.result(timeout=seconds)


@contextmanager
def _progress(engine: AsyncEngine, job_id: UUID) -> Iterator[None]:
    """Say on a terminal what the job says of itself while the block lasts."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    showing = asyncio.create_task(_show(engine, job_id))
    try:
        yield
    finally:
        showing.cancel()


async def _show(engine: AsyncEngine, job_id: UUID) -> None:
    last: dict[str, Any] | None = None
    while True:
        await asyncio.sleep(_LOOK_EVERY.total_seconds())
        try:
            stand = (await look(engine, [job_id])).get(job_id)
        except Exception as error:
            if not is_transient(error):
                raise
            continue
        if stand is not None and stand.progress is not None and stand.progress != last:
            last = stand.progress
            of = f" of {last['total']}" if last.get("total") is not None else ""
            note(f"{last.get('done')}{of} {last.get('text') or ''}".strip())
