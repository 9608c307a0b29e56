"""What is known of the connections that attempts have: only while they have them."""

from __future__ import annotations

import gc

from sqlalchemy import text

from tests.db.attempts import an_attempt
from worker.db import transaction
from worker.flow.work import Work


async def test_an_attempt_that_has_ended_is_remembered_by_nobody(work: Work) -> None:
    before = len(transaction._serving)

    for _ in range(5):
        async with an_attempt(work) as attempt:
            await attempt.session().execute(text("SELECT 1"))
    gc.collect()

    assert len(transaction._serving) == before


async def test_an_engine_that_is_guarded_again_hears_of_each_statement_once(work: Work) -> None:
    heard = len(list(work.jobs_engine.sync_engine.dialect.dispatch.do_execute))

    transaction.guard(work.jobs_engine)

    assert len(list(work.jobs_engine.sync_engine.dialect.dispatch.do_execute)) == heard
