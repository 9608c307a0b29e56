"""The attempt's one transaction: what a job may do with its session, with the token held and with the token lost."""

from __future__ import annotations

from contextlib import suppress
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.db.attempts import an_attempt, kept_by_plain_sqlalchemy, run, words
from tests.db.conftest import statements_of
from tests.db.moves import a_held_job
from tests.db.session_cases import CASES, Body, add, does_nothing, write
from tests.support import row
from worker.core.errors import LeaseLost, TransactionAborted, TransactionEscaped
from worker.core.states import JobState
from worker.db.transitions import Held
from worker.flow.work import Work

pytestmark = [pytest.mark.leaves_running, pytest.mark.usefixtures("note_table")]


# ── the matrix ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
async def test_an_attempt_keeps_what_plain_sqlalchemy_keeps(work: Work, engine: AsyncEngine, body: Body) -> None:
    expected = await kept_by_plain_sqlalchemy(engine, body)
    held = await a_held_job(engine)

    committed = await run(work, held, body)

    assert await words(engine) == expected
    assert (await row(engine, held.job_id)).state == (JobState.SUCCEEDED if committed else JobState.RUNNING)
    assert committed == (body is not does_nothing)


@pytest.mark.parametrize("body", [body for body in CASES if body is not does_nothing], ids=lambda body: body.__name__)
async def test_an_attempt_that_lost_its_token_keeps_nothing(work: Work, engine: AsyncEngine, body: Body) -> None:
    held = await a_held_job(engine)

    with pytest.raises(LeaseLost):
        await run(work, Held(held.job_id, uuid4()), body)

    assert await words(engine) == set()
    assert (await row(engine, held.job_id)).state == JobState.RUNNING


@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
async def test_an_attempt_that_raised_keeps_nothing(work: Work, engine: AsyncEngine, body: Body) -> None:
    async with an_attempt(work) as attempt:
        await body(attempt.session())

    assert await words(engine) == set()


async def test_async_code_gets_the_engine_as_its_bind_at_any_time_and_takes_no_connection_by_it(
    work: Work, engine: AsyncEngine
) -> None:
    async with an_attempt(work) as attempt:
        session = attempt.session()
        binds = [session.get_bind()]
        taken = attempt.transaction.taken
        await write(session, "a")
        await session.commit()
        binds.append(session.get_bind())

    assert not taken
    assert binds == [work.jobs_engine.sync_engine] * 2


# ── what it costs ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_job_that_executes_nothing_takes_no_connection(work: Work, engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    committed = await run(work, held, does_nothing)

    assert not committed
    assert work.jobs_engine.pool.checkedin() == 0  # type: ignore[attr-defined]  # the pool's own, a queue


async def test_an_ordinary_job_pays_no_savepoint(work: Work, engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    async def body(session: AsyncSession) -> None:
        add(session, "a")

    with statements_of(work.jobs_engine) as sent:
        await run(work, held, body)

    assert [statement.split()[0] for statement in sent] == ["INSERT"]  # the completion goes with the COMMIT


async def test_a_job_that_commits_at_its_end_pays_no_savepoint(work: Work, engine: AsyncEngine) -> None:
    held = await a_held_job(engine)

    async def body(session: AsyncSession) -> None:
        add(session, "a")
        await session.commit()

    with statements_of(work.jobs_engine) as sent:
        await run(work, held, body)

    assert [statement.split()[0] for statement in sent] == ["INSERT"]  # the completion goes with the COMMIT


# ── swallowed errors ────────────────────────────────────────────────────────────────────────────────────────────────


async def swallows_a_failed_flush(session: AsyncSession) -> None:
    await write(session, "a")
    add(session, "a")
    with suppress(IntegrityError):
        await session.flush()


async def swallows_a_failed_statement(session: AsyncSession) -> None:
    await write(session, "a")
    with suppress(IntegrityError):
        await write(session, "a")


async def swallows_a_failed_statement_after_a_commit(session: AsyncSession) -> None:
    await write(session, "a")
    await session.commit()
    with suppress(IntegrityError):
        await write(session, "a")


@pytest.mark.parametrize(
    "body",
    [swallows_a_failed_flush, swallows_a_failed_statement, swallows_a_failed_statement_after_a_commit],
    ids=lambda body: body.__name__,
)
async def test_a_swallowed_error_fails_the_attempt_with_advice(work: Work, engine: AsyncEngine, body: Body) -> None:
    held = await a_held_job(engine)

    with pytest.raises(TransactionAborted, match=r"session\.rollback\(\)"):
        await run(work, held, body)

    assert await words(engine) == set()
    assert (await row(engine, held.job_id)).state == JobState.RUNNING


# ── behind our back ─────────────────────────────────────────────────────────────────────────────────────────────────


async def sends_commit(session: AsyncSession) -> None:
    await session.execute(text("COMMIT"))


async def sends_commit_and_goes_on(session: AsyncSession) -> None:
    await session.execute(text("COMMIT"))
    await write(session, "b")


async def sends_commit_and_chain(session: AsyncSession) -> None:
    await session.execute(text("  commit and chain"))


async def sends_commit_and_begin(session: AsyncSession) -> None:
    await session.execute(text("/* now */ COMMIT"))
    await session.execute(text("BEGIN"))


async def sends_end(session: AsyncSession) -> None:
    await session.execute(text("-- the end\nEND"))


async def sends_rollback(session: AsyncSession) -> None:
    await session.execute(text("ROLLBACK"))


async def sends_rollback_and_begin(session: AsyncSession) -> None:
    await session.execute(text("ROLLBACK"))
    await session.execute(text("BEGIN"))


async def sends_abort(session: AsyncSession) -> None:
    await session.execute(text("abort"))


async def sends_commit_after_a_commit(session: AsyncSession) -> None:
    await session.commit()
    await session.execute(text("COMMIT"))


async def commits_its_connection(session: AsyncSession) -> None:
    await (await session.connection()).commit()


async def commits_its_connection_and_hides_the_refusal(session: AsyncSession) -> None:
    with suppress(TransactionEscaped):
        await (await session.connection()).commit()


async def rolls_back_its_connection_after_a_commit(session: AsyncSession) -> None:
    await session.commit()
    await (await session.connection()).rollback()


async def rolls_back_its_driver_connection(session: AsyncSession) -> None:
    raw = await (await session.connection()).get_raw_connection()
    await raw.driver_connection.execute("ROLLBACK")  # type: ignore[union-attr]  # a connection is there


ESCAPES = [
    sends_commit,
    sends_commit_and_goes_on,
    sends_commit_and_chain,
    sends_commit_and_begin,
    sends_end,
    sends_rollback,
    sends_rollback_and_begin,
    sends_abort,
    sends_commit_after_a_commit,
    commits_its_connection,
    commits_its_connection_and_hides_the_refusal,
    rolls_back_its_connection_after_a_commit,
    rolls_back_its_driver_connection,
]


@pytest.mark.parametrize("body", ESCAPES, ids=lambda body: body.__name__)
async def test_a_job_that_ends_its_transaction_behind_our_back_fails_and_keeps_nothing(
    work: Work, engine: AsyncEngine, body: Body
) -> None:
    held = await a_held_job(engine)

    async def writes_first(session: AsyncSession) -> None:
        await write(session, "a")
        await body(session)

    with pytest.raises(TransactionEscaped):
        await run(work, held, writes_first)

    assert await words(engine) == set()
    assert (await row(engine, held.job_id)).state == JobState.RUNNING
