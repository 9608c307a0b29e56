"""Drain: what is due runs in the test's transaction as in a worker, and what it raises is the test's."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from jobs.ledger import Account, PaymentOrder
from tests.db.attempts import kept_by_plain_sqlalchemy
from tests.db.session_cases import CASES, Body
from tests.db.session_cases import write as write_note
from tests.flow.helpers import note, notes, registry_of
from tests.testing.jobs_for_tests import (
    commits_and_raises,
    end,
    fails_twice,
    for_ever,
    hangs_up,
    legacy,
    nothing,
    slow,
    throws_its_connection_away,
    write,
    writes_read_only,
)
from worker import Client, UnknownJob, enqueue
from worker.core.errors import AutocommitRefused, TransactionAborted
from worker.flow.job import JobFunction
from worker.flow.run import JobTimeout
from worker.testing import Ended, NeverDrained, assert_enqueued, drain, frozen_clock, rolled_back
from worker.testing.borrow import ConnectionLost


async def words(session: AsyncSession) -> list[str]:
    return list((await session.scalars(text("SELECT word FROM note ORDER BY word"))).all())


def outcomes(ended: Sequence[Ended]) -> list[str]:
    return [one.outcome for one in ended]


# ── in the session's transaction ────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_due_runs_with_what_it_enqueues(session: AsyncSession) -> None:
    await write.enqueue(session, "a", again=2)
    await nothing.enqueue(session)

    ended = await drain(session)

    assert [(one.name, one.attempt, one.outcome, one.error) for one in ended] == [
        ("t.write", 1, "succeeded", None),
        ("t.nothing", 1, "succeeded", None),
        ("t.write", 1, "succeeded", None),
        ("t.write", 1, "succeeded", None),
    ]
    assert await words(session) == ["a", "a!", "a!!"]
    assert await drain(session) == []


async def test_what_was_drained_and_committed_is_rolled_back_with_the_test(exarq_client: Client) -> None:
    async with rolled_back(exarq_client.engine) as sessions:
        async with sessions.begin() as session:
            await write.enqueue(session, "a")
            await drain(session)
        async with sessions() as session:
            assert await words(session) == ["a"]
            await session.rollback()
            assert await words(session) == ["a"]

    assert await notes(exarq_client.engine) == []


async def test_a_plain_session_commits_what_was_drained_in_it(exarq_client: Client) -> None:
    async with exarq_client.sessions.begin() as session:
        await write.enqueue(session, "a")
        await drain(session)

    assert await notes(exarq_client.engine) == ["a"]


@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
async def test_a_drained_job_keeps_what_plain_sqlalchemy_keeps(
    exarq_client: Client, session: AsyncSession, body: Body
) -> None:
    expected = await kept_by_plain_sqlalchemy(exarq_client.engine, body)

    async def job(session: AsyncSession) -> None:
        await body(session)

    await JobFunction(job, name="tests.job").enqueue(session)
    (ended,) = await drain(session, registry=registry_of(job))

    assert ended.outcome == "succeeded"
    assert set(await words(session)) == expected


async def test_a_def_job_runs_in_the_tests_transaction_too(session: AsyncSession) -> None:
    await legacy.enqueue(session, "a")

    assert outcomes(await drain(session)) == ["succeeded"]
    assert await words(session) == ["a"]


async def test_a_read_only_job_cannot_write_whatever_the_tests_transaction_may(session: AsyncSession) -> None:
    await writes_read_only.enqueue(session)

    with pytest.raises(DBAPIError, match="cannot execute INSERT in a read-only transaction"):
        await drain(session)
    await note(session, "the test writes")

    assert await words(session) == ["the test writes"]


async def test_what_a_job_has_committed_by_itself_stays_when_it_raises(session: AsyncSession) -> None:
    await commits_and_raises.enqueue(session)

    assert outcomes(await drain(session, raises=False)) == ["retried"]
    assert await words(session) == ["committed"]


async def test_what_the_session_has_loaded_is_read_anew(session: AsyncSession) -> None:
    kept, gone = Account(name="kept"), Account(name="gone")
    order = PaymentOrder(id=uuid4(), debit="kept", credit="kept", amount=1)
    session.add_all([kept, gone])
    await session.flush()
    session.add(order)

    async def job(session: AsyncSession) -> None:
        await session.execute(text("UPDATE payment_order SET amount = 2"))
        await session.execute(text("DELETE FROM account WHERE name = 'gone'"))

    await JobFunction(job, name="tests.job").enqueue(session)
    await drain(session, registry=registry_of(job))

    assert order.amount == 2
    assert (await session.scalars(select(Account.name))).all() == ["kept"]


async def test_what_the_test_has_set_on_its_connection_stays(session: AsyncSession) -> None:
    await session.execute(text("SET statement_timeout = '54321'"))
    await session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '12345'"))
    await session.execute(text("CREATE TEMP TABLE mine ()"))
    await write.enqueue(session, "a")

    await drain(session)

    assert await session.scalar(text("SHOW statement_timeout")) == "54321ms"
    assert await session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "12345ms"
    assert await session.scalar(text("SELECT to_regclass('mine')")) == "mine"


async def test_the_context_gives_what_the_test_gives(session: AsyncSession) -> None:
    await enqueue(session, "t.book", {"order_id": "0b7e4b0c-6c9b-4f0e-8a37-1f1c3d1b6f10"})

    await drain(session, context={"shop": "corner"})

    assert await words(session) == ["0b7e4b0c-6c9b-4f0e-8a37-1f1c3d1b6f10 corner"]


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("how", "match"), [("raise", "as asked"), ("fail", "hopeless"), ("retry", "the job asked for another attempt")]
)
async def test_what_a_job_raises_is_raised_in_the_test_once_it_is_stored(
    session: AsyncSession, how: str, match: str
) -> None:
    await end.enqueue(session, how)
    await write.enqueue(session, "later")

    with pytest.raises(Exception, match=match) as raised:
        await drain(session)

    assert [frame.name for frame in raised.traceback][-1] == "end"
    assert raised.value.__notes__ == [f"t.end, attempt 1: {'failed' if how == 'fail' else 'retried'}"]
    assert await words(session) == []
    states = await session.execute(text("SELECT name, state, error FROM exarq.job ORDER BY id"))
    first, second = states.all()
    assert first.error is not None
    assert second.state == "queued"


async def test_the_drain_goes_on_and_tells_how_each_ended_if_asked_to(session: AsyncSession) -> None:
    for how in ("raise", "retry", "snooze", "cancel", "fail", "return"):
        await end.enqueue(session, how)

    ended = await drain(session, raises=False)

    assert outcomes(ended) == ["retried", "retried", "snoozed", "cancelled", "failed", "succeeded"]
    assert [type(one.error).__name__ for one in ended] == [
        "ValueError",
        "Retry",
        "Snooze",
        "Cancel",
        "Fail",
        "NoneType",
    ]
    assert await words(session) == ["return"]


async def test_a_retry_is_not_due_within_the_same_drain_however_short_its_wait(
    session: AsyncSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.000_002)  # the jitter, of a second
    await end.enqueue(session, "raise")

    assert outcomes(await drain(session, raises=False)) == ["retried"]
    assert outcomes(await drain(session, raises=False)) == ["retried"]


async def test_a_job_that_is_put_off_or_no_longer_wanted_fails_no_test(session: AsyncSession) -> None:
    await end.enqueue(session, "snooze")
    await end.enqueue(session, "cancel")

    assert outcomes(await drain(session)) == ["snoozed", "cancelled"]


async def test_a_job_that_nobody_imported_is_an_error_that_says_so(session: AsyncSession) -> None:
    await enqueue(session, "t.wrote", {})

    with pytest.raises(UnknownJob, match=r"no job named 't.wrote'; did you mean 't.write'"):
        await drain(session)


async def test_a_job_that_swallows_a_failed_statement_fails_and_the_test_goes_on(session: AsyncSession) -> None:
    async def job(session: AsyncSession) -> None:
        await write_note(session, "a")
        with pytest.raises(IntegrityError):
            await write_note(session, "a")

    await JobFunction(job, name="tests.job").enqueue(session)
    with pytest.raises(TransactionAborted):
        await drain(session, registry=registry_of(job))

    assert await words(session) == []


async def test_a_job_that_times_out_in_a_query_is_rolled_back_and_the_test_goes_on(session: AsyncSession) -> None:
    await note(session, "before")
    await slow.enqueue(session)

    with pytest.raises(JobTimeout):
        await drain(session)

    assert await words(session) == ["before"]


async def test_what_was_written_on_a_connection_thrown_away_is_rolled_back(session: AsyncSession) -> None:
    await throws_its_connection_away.enqueue(session)

    with pytest.raises(ConnectionError):
        await drain(session)

    assert await words(session) == []


async def test_a_connection_that_a_job_closes_ends_the_drain(exarq_client: Client) -> None:
    session = exarq_client.sessions()
    await hangs_up.enqueue(session)

    with pytest.raises(ConnectionLost):
        await drain(session)
    await session.invalidate()


async def test_a_session_without_a_transaction_is_refused(engine: AsyncEngine) -> None:
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(AutocommitRefused, match="AUTOCOMMIT"):
            await drain(session)


# ── what is due later ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_due_later_waits_until_the_test_asks_for_it(session: AsyncSession) -> None:
    await write.options(delay=timedelta(days=3)).enqueue(session, "third")
    await write.options(delay=60).enqueue(session, "first", again=1)

    assert await drain(session) == []
    ended = await drain(session, with_scheduled=True)

    assert outcomes(ended) == ["succeeded"] * 3
    assert await words(session) == ["first", "first!", "third"]
    (later, first, follow_up) = await assert_enqueued(session, write)
    assert timedelta(days=2) < later.run_at - follow_up.run_at
    assert follow_up.run_at >= first.run_at


async def test_a_job_is_tried_again_until_it_succeeds_and_the_clock_is_what_it_was(session: AsyncSession) -> None:
    await fails_twice.enqueue(session)

    with frozen_clock() as clock:
        before = clock.now
        ended = await drain(session, raises=False, with_scheduled=True)
        assert clock.now == before

    assert outcomes(ended) == ["retried", "retried", "succeeded"]
    assert await words(session) == ["attempt 3"]


async def test_a_job_that_goes_on_for_ever_is_stopped(session: AsyncSession) -> None:
    await for_ever.enqueue(session)

    with pytest.raises(NeverDrained, match=r"does t\.for_ever enqueue"):
        await drain(session, with_scheduled=True, limit=5)


# ── what is committed ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_client_drains_what_is_committed(exarq_client: Client) -> None:
    async with exarq_client.sessions.begin() as session:
        await write.enqueue(session, "a", again=1)
        await write.options(delay=60).enqueue(session, "later")
    async with exarq_client.sessions() as session:
        await write.enqueue(session, "rolled back")
        await session.rollback()

    assert outcomes(await drain(exarq_client)) == ["succeeded"] * 2
    assert outcomes(await drain(exarq_client, with_scheduled=True)) == ["succeeded"]

    assert await notes(exarq_client.engine) == ["a", "a!", "later"]
    assert len(await assert_enqueued(exarq_client, write, count=3)) == 3


async def test_a_client_raises_what_a_committed_job_raises(exarq_client: Client) -> None:
    async with exarq_client.sessions.begin() as session:
        await end.enqueue(session, "raise")

    with pytest.raises(ValueError, match="as asked"):
        await drain(exarq_client)

    assert await notes(exarq_client.engine) == []


async def test_the_result_of_a_drained_job_is_there_without_a_redis(exarq_client: Client) -> None:
    async with exarq_client.sessions.begin() as session:
        handle = await nothing.enqueue(session)
    await drain(exarq_client)

    assert [await handle.result(timeout=0), await handle.result()] == [1, 1]
