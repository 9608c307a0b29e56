"""Run inline: one job, here and now, with all that a worker would do to its arguments, its session and its result."""

from __future__ import annotations

from datetime import date
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.db.session_cases import Note
from tests.testing.jobs_for_tests import book, end, legacy, nothing, write
from worker import ArgumentsInvalid, Cancel, Fail, JobContext, NotStorable, Retry, Snooze
from worker.flow.job import JobFunction
from worker.testing import assert_enqueued, assert_not_enqueued, enqueued, run_inline


async def test_a_job_returns_its_result_and_what_it_wrote_is_there(session: AsyncSession) -> None:
    assert await run_inline(write, session, "a") == "A"

    assert await session.get(Note, "a") is not None


async def test_only_what_the_job_enqueued_is_enqueued(session: AsyncSession) -> None:
    await run_inline(write, session, "a", again=3)

    (follow_up,) = await enqueued(session)
    assert follow_up.args == {"word": "a!", "again": 2}
    await assert_enqueued(session, write, count=1)


async def test_the_context_has_what_the_test_gives_and_is_at_its_first_attempt(session: AsyncSession) -> None:
    order_id = uuid4()

    assert await run_inline(book, session, order_id, date(2026, 12, 24), context={"shop": "corner"}) == date(
        2026, 12, 24
    )
    assert await run_inline(nothing, session) == 1
    assert await run_inline(legacy, session, "sync") == "sync"

    assert await session.get(Note, f"{order_id} corner") is not None


@pytest.mark.parametrize(
    ("how", "error"), [("raise", ValueError), ("retry", Retry), ("snooze", Snooze), ("cancel", Cancel), ("fail", Fail)]
)
async def test_what_a_job_raises_is_raised_and_what_it_wrote_is_rolled_back(
    session: AsyncSession, how: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await run_inline(end, session, how)

    assert await session.get(Note, how) is None
    await assert_not_enqueued(session)
    assert await session.scalar(text("SELECT count(*) FROM exarq.attempt")) == 0


async def test_what_the_test_has_not_flushed_is_there_for_the_job(session: AsyncSession) -> None:
    async def job(session: AsyncSession) -> bool:
        return await session.get(Note, "pending") is not None

    session.add(Note(word="pending"))

    assert await run_inline(JobFunction(job, name="t.job"), session)


async def test_arguments_and_results_make_the_way_through_json(session: AsyncSession) -> None:
    given = {"items": (1, 2)}

    async def job(ctx: JobContext, order: dict[str, Any]) -> dict[str, Any]:
        assert order == {"items": [1, 2]}
        return given

    assert await run_inline(JobFunction(job, name="t.job"), session, given) == {"items": [1, 2]}


async def test_what_is_no_json_fails_as_in_production(session: AsyncSession) -> None:
    async def job(ctx: JobContext, thing: Any = None) -> Any:
        return object()

    with pytest.raises(NotStorable):
        await run_inline(JobFunction(job, name="t.job"), session)
    with pytest.raises(NotStorable):
        await run_inline(JobFunction(job, name="t.job"), session, object())
    with pytest.raises(ArgumentsInvalid, match="unknown argument 'wrod'; did you mean 'word'"):
        await run_inline(write, session, wrod="a")  # type: ignore[call-overload]
