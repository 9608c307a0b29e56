"""Flush: many successes with one statement; a guilty one is alone, a lost answer is asked again."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
import structlog
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.flow.helpers import NAME, a_work_with, claimed, start
from tests.proxy import postgres_proxy
from tests.support import a_job, a_locked_row, attempts, heard, row, state, until
from worker.core.context import JobContext
from worker.core.signature import Signature
from worker.core.states import JobState
from worker.db import transitions
from worker.db.ids import uuid7
from worker.db.models import Job
from worker.db.transitions import Held
from worker.flow import flush as module
from worker.flow.work import Work
from worker.observe.events import AttemptEnded, StaleWriteRefused, StepFailed, listen
from worker.settings import Settings, load_settings


async def answers(ctx: JobContext, word: str) -> str:
    return word


async def run_all(work: Work, engine: AsyncEngine, *words: str) -> list[UUID]:
    ids = [await a_job(engine, name=NAME, args={"word": word}) for word in words]
    await asyncio.gather(*(start(work, run) for run in await claimed(work, *ids)))
    await work.flusher.drain()
    return ids


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many successes each statement stored."""
    sent: list[int] = []
    real = transitions.succeed_many

    async def counting(connection: Any, results: Any, remarks: Any) -> Any:
        sent.append(len(results))
        return await real(connection, results, remarks)

    monkeypatch.setattr(transitions, "succeed_many", counting)
    return sent


async def test_successes_of_the_same_moment_are_stored_with_one_statement(
    engine: AsyncEngine, settings: Settings, statements: list[int]
) -> None:
    async with a_work_with(settings, answers) as work:
        ids = await run_all(work, engine, *(f"w{number}" for number in range(10)))

        assert statements == [10]
        assert [(await row(engine, job)).result for job in ids] == [f"w{number}" for number in range(10)]
        assert work.holdings.runs() == {}
        assert work.counts.succeeded == 10
        assert work.flusher.backlog == 0


async def test_what_a_job_has_bound_to_its_log_lines_is_not_said_of_others(
    engine: AsyncEngine, settings: Settings
) -> None:
    told: list[dict[str, Any]] = []
    stop = listen(lambda event: told.append(structlog.contextvars.get_contextvars()))

    async def binds(ctx: JobContext, word: str) -> None:
        structlog.contextvars.bind_contextvars(word=word)

    async with a_work_with(settings, binds) as work:
        await run_all(work, engine, "a", "b")
    stop()

    assert told
    assert not any("word" in bound for bound in told)


async def test_a_job_is_held_until_its_success_is_stored(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_work_with(settings, answers) as work:
        job = await a_job(engine, name=NAME, args={"word": "a"})
        (run,) = await claimed(work, job)

        await start(work, run)
        held = work.holdings.runs()
        await work.flusher.drain()

        assert held == {run.claimed.held: run}
        assert work.holdings.runs() == {}


async def test_more_than_a_statement_takes_is_stored_with_several(
    engine: AsyncEngine, settings: Settings, statements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGEST_FLUSH", 4)

    async with a_work_with(settings, answers) as work:
        ids = await run_all(work, engine, *"abcdefghij")

        assert sum(statements) == 10
        assert max(statements) == 4
        assert {await state(engine, job) for job in ids} == {"succeeded"}


@pytest.mark.parametrize("result", ['"a\\u0000b"', '"a\0b"', "not json", '"\\ud800"', '"\ud800"'])
async def test_a_result_the_server_refuses_fails_alone(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch, result: str
) -> None:
    real = Signature.encode_result
    monkeypatch.setattr(
        Signature, "encode_result", lambda self, value: result if value == "guilty" else real(self, value)
    )

    async with a_work_with(settings, answers) as work:
        ids = await run_all(work, engine, "a", "b", "guilty", "c", "d")

        guilty = ids.pop(2)
        found, (attempt,) = await row(engine, guilty), await attempts(engine, guilty)
        assert {await state(engine, job) for job in ids} == {"succeeded"}
        assert (found.state, found.failures, attempt.ending) == ("queued", 1, "retried")
        assert work.holdings.runs() == {}


async def test_an_error_that_nobody_foresaw_fails_its_job_and_no_other(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = transitions.succeed_many

    async def unforeseen(connection: Any, results: dict[Held, str], remarks: Any) -> Any:
        if '"guilty"' in results.values():
            raise RuntimeError("unforeseen")
        return await real(connection, results, remarks)

    monkeypatch.setattr(transitions, "succeed_many", unforeseen)
    async with a_work_with(settings, answers) as work:
        ids = await run_all(work, engine, "a", "guilty", "b")

        assert [await state(engine, job) for job in ids] == ["succeeded", "queued", "succeeded"]


async def test_a_job_held_by_somebody_else_is_told_as_lost_and_the_others_are_stored(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work_with(settings, answers) as work, heard() as told:
        lost, kept = [await a_job(engine, name=NAME, args={"word": word}) for word in "ab"]
        runs = await claimed(work, lost, kept)
        async with engine.begin() as connection:
            await connection.execute(update(Job).where(Job.id == lost).values(token=uuid7()))

        await asyncio.gather(*(start(work, run) for run in runs))
        await work.flusher.drain()

        assert (await state(engine, lost), await state(engine, kept)) == ("running", "succeeded")
        assert [one.job for one in told if isinstance(one, StaleWriteRefused)] == [lost]
        assert work.holdings.runs() == {}
        async with engine.begin() as connection:
            await connection.execute(update(Job).where(Job.id == lost).values(state=JobState.CANCELLED))


async def test_a_flush_whose_answer_was_lost_is_sent_again_and_counts_as_done(
    engine: AsyncEngine, settings: Settings, database_url: str, statements: list[int]
) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        behind = load_settings(database={"url": url}, redis={"url": settings.redis.url}, worker={"lease": 5})
        async with a_work_with(behind, answers) as work, heard() as told:
            job = await a_job(engine, name=NAME, args={"word": "a"})
            (run,) = await claimed(work, job)
            proxy.lose_the_answer_to(lambda asked: job.bytes in asked)

            await start(work, run)
            await work.flusher.drain()

            assert proxy.lost.is_set()
            assert statements == [1, 1]
            assert (await row(engine, job)).result == "a"
            assert [type(one) for one in told] == [StepFailed, AttemptEnded]


async def test_two_flushes_of_the_same_rows_in_opposite_order_do_not_deadlock(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO exarq.job (id, name, queue, args, state, token, worker_id)"
                " SELECT gen_random_uuid(), 'a', 'default', '{}', 'running', gen_random_uuid(), gen_random_uuid()"
                " FROM generate_series(1, 2000)"
            )
        )
        rows = (await connection.execute(text("SELECT id, token FROM exarq.job"))).all()
    held = [Held(id_, token) for id_, token in rows]

    async def flush(order: list[Held]) -> int:
        async with engine.begin() as connection:
            return len(await transitions.succeed_many(connection, dict.fromkeys(order, "1")))

    stored = await asyncio.gather(flush(held), flush(held[::-1]), flush(held), flush(held[::-1]))

    assert sum(stored) == 2000


async def test_a_row_that_somebody_holds_keeps_no_other_success_waiting(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work_with(settings, answers) as work:
        ids = [await a_job(engine, name=NAME, args={"word": word}) for word in ("held", "b", "c")]
        runs = await claimed(work, *ids)

        async with a_locked_row(engine, ids[0]):
            await asyncio.gather(*(start(work, run) for run in runs))
            await until(lambda: [held.job_id for held in work.holdings.runs()] == ids[:1], "the others are stored")
            meanwhile = [await state(engine, job_id) for job_id in ids]
        await work.flusher.drain()

        assert meanwhile == [JobState.RUNNING, JobState.SUCCEEDED, JobState.SUCCEEDED]
        assert await state(engine, ids[0]) == JobState.SUCCEEDED
        assert work.counts.succeeded == 3


async def _have_succeeded(engine: AsyncEngine, ids: list[UUID]) -> bool:
    return {await state(engine, job_id) for job_id in ids} == {JobState.SUCCEEDED}


async def test_a_flush_takes_no_more_text_than_one_statement_can_carry(
    engine: AsyncEngine, settings: Settings, statements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGEST_TEXT", 30)  # each result has two quotes as well
    async with a_work_with(settings, answers) as work:
        ids = await run_all(work, engine, *("x" * 8 for _ in range(7)), "y" * 100)

        assert await _have_succeeded(engine, ids)
        assert sum(statements) == 8
        assert max(statements) == 3


async def test_of_two_attempts_of_one_job_only_the_one_that_holds_it_has_succeeded(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work_with(settings, answers) as work, heard() as told:
        job_id = await a_job(engine, name=NAME, args={"word": "a"})
        (first,) = await claimed(work, job_id)
        async with engine.begin() as connection:
            await transitions.release_many(connection, [first.claimed.held], "rescued")
        (second,) = await claimed(work, job_id)

        work.flusher.add(first, '"first"')
        work.flusher.add(second, '"second"')
        await work.flusher.drain()

        assert (await row(engine, job_id)).result == "second"
        assert work.counts.succeeded == 1
        assert [type(one) for one in told if not isinstance(one, AttemptEnded)] == [StaleWriteRefused]
