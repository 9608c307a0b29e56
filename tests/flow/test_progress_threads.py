"""A thread that says how far it is, while what was said before is being stored."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.flow.helpers import NAME, a_work_with, claimed
from tests.support import a_job, row, until
from worker.core.context import JobContext
from worker.flow.progress import Reports
from worker.settings import Settings

pytestmark = pytest.mark.leaves_running


async def a_job_of_a_thread(ctx: JobContext) -> None: ...


async def test_a_word_that_a_thread_was_about_to_leave_when_others_were_taken_is_stored(
    engine: AsyncEngine, settings: Settings
) -> None:
    ids = [await a_job(engine, name=NAME) for _ in range(2)]
    async with a_work_with(settings, a_job_of_a_thread) as work:
        early, late = await claimed(work, *ids)
        reports = Reports(work.processor)
        in_the_threads_hand = reports._unstored
        in_the_threads_hand[early.claimed.held] = '{"done": 1}'
        reports._store_soon(work.processor)
        await until(lambda: not reports._unstored, "the first word is taken")

        in_the_threads_hand[late.claimed.held] = '{"done": 2}'
        reports._store_soon(work.processor)

        async def stored() -> bool:
            return [(await row(engine, job)).progress for job in ids].count(None) == 0

        await until(stored, "both words")
        await reports.close()
