"""A job that the clock enqueues each second; loaded by workers under test only, for every worker that knows it ticks."""

from __future__ import annotations

from worker.core.context import JobContext
from worker.flow.job import job


@job(name="tests.ticks", every=1, catch_up="all")
async def ticks(ctx: JobContext) -> None:
    """Do nothing."""
