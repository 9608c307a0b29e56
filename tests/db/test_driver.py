"""The completion and the resets go in the message of the COMMIT, and nothing of that changes what they mean."""

from __future__ import annotations

import json
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.db.attempts import an_attempt, ask, run, words
from tests.db.moves import a_held_job
from tests.db.session_cases import write
from tests.support import row
from worker.core.errors import LeaseLost
from worker.core.states import JobState
from worker.db import transitions
from worker.db.driver import Driver
from worker.db.transitions import Held
from worker.flow.work import Work

pytestmark = [pytest.mark.leaves_running, pytest.mark.usefixtures("note_table")]

AWKWARD = ["it's", "\\", "\\'", "'; DROP TABLE note; --", 'a "quote"', "$1 %s :name", "é \u2028 \U0001f600", "\n\t"]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The simple queries that connections of ours have sent."""
    queries: list[str] = []
    execute = Driver.execute

    async def noted(driver: Driver, query: str, *args: Any, timeout: float | None = None) -> str:
        queries.append(query)
        return await execute(driver, query, *args, timeout=timeout)

    monkeypatch.setattr(Driver, "execute", noted)
    return queries


async def the_backend_of_the_next(work: Work) -> int | None:
    """Which backend serves an attempt that commits nothing."""
    async with an_attempt(work) as attempt:
        await write(attempt.session(), "b")
        return attempt.transaction.backend_pid


@pytest.mark.parametrize("conforming", ["on", "off"])
async def test_a_result_is_stored_as_it_is_whatever_the_settings_of_the_connection(
    work: Work, engine: AsyncEngine, conforming: str
) -> None:
    held = await a_held_job(engine)

    async with an_attempt(work) as attempt:
        await attempt.session().execute(text(f"SET standard_conforming_strings = {conforming}"))
        assert await attempt.commit_success(held, json.dumps(AWKWARD, ensure_ascii=False))

    job = await row(engine, held.job_id)
    assert (job.state, job.result) == (JobState.SUCCEEDED, AWKWARD)


async def test_a_result_is_stored_as_it_is_where_the_job_has_changed_the_encoding(
    work: Work, engine: AsyncEngine
) -> None:
    held = await a_held_job(engine)

    async with an_attempt(work) as attempt:
        await attempt.session().execute(text("SET client_encoding = 'LATIN1'"))
        assert await attempt.commit_success(held, '"Müller"')

    assert (await row(engine, held.job_id)).result == "Müller"


async def test_a_success_sends_no_message_but_its_begin_and_its_commit(
    work: Work, engine: AsyncEngine, sent: list[str]
) -> None:
    held = await a_held_job(engine)
    await run(work, await a_held_job(engine), partial(write, word="first"))  # which SQLAlchemy asks who the server is
    del sent[:]

    async with an_attempt(work) as attempt:
        await write(attempt.session(), "a")
        await attempt.commit_success(held, "1")

    assert sent == ["BEGIN;", "COMMIT;"]


async def test_a_success_is_stored_by_key_and_keeps_no_plan_from_when_the_table_was_small(
    work: Work, engine: AsyncEngine
) -> None:
    held = await a_held_job(engine)
    async with engine.connect() as plain:
        await (await plain.execution_options(isolation_level="AUTOCOMMIT")).execute(text("VACUUM ANALYZE exarq.job"))

    async with work.jobs_engine.connect() as connection:
        await connection.execute(text(transitions.success_of(held, "1")))
        scans = text("SELECT seq_scan, idx_scan FROM pg_stat_xact_user_tables WHERE relid = 'exarq.job'::regclass")
        assert (await connection.execute(scans)).one() == (0, 1)


async def test_a_lost_job_is_rolled_back_and_its_connection_serves_the_next(work: Work, engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    async with an_attempt(work) as attempt:
        await write(attempt.session(), "a")
        with pytest.raises(LeaseLost):
            await attempt.commit_success(Held(held.job_id, uuid4()), "1")
        assert not attempt.transaction.commit_sent
        backend = attempt.transaction.backend_pid

    assert await the_backend_of_the_next(work) == backend
    assert await words(engine) == set()


async def test_what_keeps_the_completion_from_being_stored_leaves_no_doubt_and_the_connection_serves_the_next(
    work: Work, engine: AsyncEngine
) -> None:
    held = await a_held_job(engine)

    async with an_attempt(work) as attempt:
        await write(attempt.session(), "a")
        await attempt.session().execute(text("SET LOCAL transaction_read_only = on"))
        with pytest.raises(DBAPIError, match="read-only"):
            await attempt.commit_success(held, "1")
        assert not attempt.transaction.commit_sent
        backend = attempt.transaction.backend_pid

    assert await the_backend_of_the_next(work) == backend
    assert await words(engine) == set()


async def test_a_transaction_that_no_statement_began_is_completed_all_the_same(work: Work, engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    async with an_attempt(work) as attempt:
        await attempt.session().connection()
        assert await attempt.commit_success(held, "1")

    assert await ask(engine, "SELECT state FROM exarq.job") == "succeeded"
