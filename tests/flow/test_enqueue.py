"""Enqueue: a row exists if and only if the caller's transaction committed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from arq.connections import ArqRedis
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.support import hints, row
from worker.client import Client
from worker.core.errors import ArgumentsInvalid, AutocommitRefused, SettingsError, TooLarge, UnknownJob
from worker.core.registry import Registry
from worker.flow.enqueue import Call, call_by_name, enqueue, enqueue_many
from worker.flow.job import JobFunction
from worker.flow.publish import Publisher
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]


async def charge(session: AsyncSession, invoice: int, note: str = "") -> None: ...


CHARGE = JobFunction(charge, name="tests.charge", queue="billing")


async def count(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT count(*) FROM exarq.job"))).scalar_one())


async def test_a_job_exists_once_its_transaction_has_committed_and_not_before(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    async with sessions.begin() as session:
        handle = await CHARGE.enqueue(session, 7, note="x")
        before = await row(engine, handle.id)

    after = await row(engine, handle.id)
    assert before is None
    assert (after.name, after.queue, after.state, after.args) == (
        "tests.charge",
        "billing",
        "queued",
        {"invoice": 7, "note": "x"},
    )


async def test_a_rollback_leaves_neither_row_nor_hint(
    engine: AsyncEngine, sessions: Sessions, publisher: Publisher, redis: ArqRedis
) -> None:
    async with sessions() as session:
        await CHARGE.enqueue(session, 7)
        await session.rollback()
        await session.commit()

    await publisher.flush()
    assert await count(engine) == 0
    assert await hints(redis, "billing") == {}


async def test_many_are_written_with_one_statement_and_answered_in_their_order(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    calls = [CHARGE.call(1), call_by_name("other.job", {"a": [1]}), CHARGE.options(queue="slow").call(2)] * 20
    statements: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))

    async with sessions.begin() as session:
        handles = await enqueue_many(session, calls)

    rows = [await row(engine, handle.id) for handle in handles]
    assert [(found.name, found.queue) for found in rows] == [(call.name, call.queue) for call in calls]
    assert [found.args for found in rows[:3]] == [{"invoice": 1}, {"a": [1]}, {"invoice": 2}]
    assert [handle.name for handle in handles] == [call.name for call in calls]
    assert len([one for one in statements if "INSERT" in one]) == 1


async def test_many_that_differ_in_their_arguments_only_wait_in_their_order_in_both_stores(
    engine: AsyncEngine, sessions: Sessions, publisher: Publisher, redis: ArqRedis
) -> None:
    numbers = list(range(500))

    async with sessions.begin() as session:
        handles = await enqueue_many(session, [CHARGE.call(number) for number in numbers])
    await publisher.flush()

    async with engine.connect() as connection:
        waiting = await connection.execute(text("SELECT args -> 'invoice' FROM exarq.job ORDER BY run_at, id"))
        assert list(waiting.scalars()) == numbers
    assert list(await hints(redis, "billing")) == [str(handle.id) for handle in handles]


async def test_many_keep_every_character_of_their_arguments(engine: AsyncEngine, sessions: Sessions) -> None:
    notes = ["", "\x1e", "\\x1e\x1f\n\r\t", '"\\"', "{NULL,null}", "å\U0001f600"]

    async with sessions.begin() as session:
        handles = await enqueue_many(session, [CHARGE.call(7, note) for note in notes])

    assert [(await row(engine, handle.id)).args["note"] for handle in handles] == notes


async def test_the_first_enqueue_on_a_connection_asks_nothing_about_types(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    sent: list[str] = []

    async with sessions.begin() as session:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        driver.add_query_logger(lambda query: sent.append(query.query))
        await CHARGE.enqueue(session, 7)

    assert sent == ["BEGIN;", "COMMIT;"]  # prepared statements are not shown


async def test_many_that_are_due_later_alike_are_due_as_the_call_says(engine: AsyncEngine, sessions: Sessions) -> None:
    at = datetime(2040, 1, 2, 3, 4, tzinfo=UTC)

    async with sessions.begin() as session:
        later = await enqueue_many(session, [CHARGE.options(delay=60).call(number) for number in range(3)])
        then = await enqueue_many(session, [CHARGE.options(run_at=at).call(number) for number in range(3)])

    delayed = [await row(engine, handle.id) for handle in later]
    assert {found.run_at - found.enqueued_at for found in delayed} == {timedelta(seconds=60)}
    assert {(await row(engine, handle.id)).run_at for handle in then} == {at}


async def test_many_on_both_sides_of_a_change_of_the_clock_keep_their_hour(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    twice = datetime(2040, 10, 28, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
    moments = [twice, twice.replace(fold=1)]

    async with sessions.begin() as session:
        handles = await enqueue_many(session, [CHARGE.options(run_at=at).call(1) for at in moments])

    first, second = [(await row(engine, handle.id)).run_at for handle in handles]
    assert second - first == timedelta(hours=1)


async def test_nothing_to_enqueue_begins_nothing(sessions: Sessions) -> None:
    async with sessions() as session:
        handles = await enqueue_many(session, [])

        assert handles == []
        assert not session.in_transaction()


async def test_by_name_needs_no_code_and_takes_the_default_queue(engine: AsyncEngine, sessions: Sessions) -> None:
    async with sessions.begin() as session:
        handle = await enqueue(session, "billing.close", {"month": "2026-10"}, queue="slow")
        plain = await enqueue(session, "billing.close")

    assert (await row(engine, handle.id)).queue == "slow"
    assert ((await row(engine, plain.id)).queue, (await row(engine, plain.id)).args) == ("default", {})


async def test_a_name_that_nobody_here_knows_is_refused_where_that_is_asked_for(
    engine: AsyncEngine, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Registry()
    here.register(CHARGE)
    monkeypatch.setattr("worker.flow.enqueue.default_registry", here)

    async with sessions.begin() as session:
        with pytest.raises(UnknownJob, match=r"no job named 'billing\.clsoe'.*import its module"):
            await enqueue(session, "billing.clsoe", strict=True)
        lenient = await enqueue(session, "billing.clsoe", strict=False)
        known = await enqueue(session, CHARGE.name, {"invoice": 7}, strict=True)

    async with engine.connect() as connection:
        assert set((await connection.execute(text("SELECT id FROM exarq.job"))).scalars()) == {lenient.id, known.id}


async def test_a_delay_counts_from_the_enqueue_not_from_the_start_of_the_transaction(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    async with sessions.begin() as session:
        await session.execute(text("SELECT pg_sleep(0.3)"))
        began = (await session.execute(text("SELECT now()"))).scalar_one()
        handle = await CHARGE.options(delay=timedelta(seconds=2)).enqueue(session, 7)

    found = await row(engine, handle.id)
    assert found.run_at - began > timedelta(seconds=2.25)
    assert abs(found.run_at - found.enqueued_at - timedelta(seconds=2)) < timedelta(milliseconds=250)


async def test_a_job_may_be_due_at_a_moment_or_in_another_queue(engine: AsyncEngine, sessions: Sessions) -> None:
    at = datetime(2040, 1, 2, 3, 4, tzinfo=UTC)

    async with sessions.begin() as session:
        handle = await CHARGE.options(run_at=at, queue="slow").enqueue(session, 7)

    found = await row(engine, handle.id)
    assert (found.run_at, found.first_due_at, found.queue) == (at, at, "slow")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_at": datetime(2040, 1, 1)}, "time zone"),
        ({"run_at": datetime.min.replace(tzinfo=UTC)}, "within 36,500 days of now"),
        ({"run_at": datetime.max.replace(tzinfo=timezone(-timedelta(hours=5)))}, "within 36,500 days of now"),
        ({"delay": -1}, "between 0 seconds"),
        ({"delay": timedelta(seconds=-1)}, "between 0 seconds"),
        ({"delay": float("nan")}, "between 0 seconds"),
        ({"delay": float("inf")}, "between 0 seconds"),
        ({"delay": 1e12}, "between 0 seconds"),
        ({"delay": "5"}, "seconds or a timedelta"),
        ({"delay": 5, "run_at": datetime(2040, 1, 1, tzinfo=UTC)}, "not both"),
        ({"queue": ""}, "a queue is 1 to 200"),
        ({"queue": "a\0b"}, "a queue is 1 to 200"),
        ({"queue": "\ud800"}, "a queue is 1 to 200"),
        ({"queue": "q" * 201}, "a queue is 1 to 200"),
    ],
)
@pytest.mark.parametrize("template", [CHARGE.options, lambda **options: call_by_name("a.b", {}, **options)])
def test_options_that_mean_nothing_are_refused(
    template: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentsInvalid, match=message):
        template(**options)


@pytest.mark.parametrize("name", ["", "a\0b", "n" * 201])
def test_a_name_no_definition_can_have_is_refused(name: str) -> None:
    with pytest.raises(ArgumentsInvalid, match="a name is 1 to 200"):
        call_by_name(name, {})


async def test_arguments_are_checked_before_anything_is_written(engine: AsyncEngine, sessions: Sessions) -> None:
    async with sessions.begin() as session:
        with pytest.raises(ArgumentsInvalid, match="invoice"):
            await CHARGE.enqueue(session, "seven")  # type: ignore[call-overload]
        with pytest.raises(TooLarge, match="1,048,576"):
            await CHARGE.enqueue(session, 7, note="x" * (1024 * 1024))
        with pytest.raises(TooLarge, match="1,048,576"):
            await enqueue(session, "a.b", {"note": "x" * (1024 * 1024)})

    assert await count(engine) == 0


@pytest.mark.parametrize("of", ["the engine", "the session's connection"])
async def test_autocommit_is_refused_before_anything_is_written(
    engine: AsyncEngine, publisher: Publisher, of: str
) -> None:
    by_itself = engine.execution_options(isolation_level="AUTOCOMMIT")
    session = AsyncSession(by_itself if of == "the engine" else engine, info=publisher.info)

    async with session:
        if of != "the engine":
            await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(AutocommitRefused, match="AUTOCOMMIT"):
            await CHARGE.enqueue(session, 7)

    assert await count(engine) == 0


async def test_without_a_publisher_and_without_settings_nothing_is_written(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("EXARQ_REDIS_URL", "EXARQ_SETTINGS"):
        monkeypatch.delenv(name, raising=False)

    async with AsyncSession(engine) as session:
        with pytest.raises(SettingsError, match="EXARQ_REDIS_URL"):
            await CHARGE.enqueue(session, 7)
        await session.commit()

    assert await count(engine) == 0


async def test_a_call_carries_what_it_was_given() -> None:
    call = CHARGE.options(delay=1.5).call(7)

    assert call == Call("tests.charge", '{"invoice":7}', "billing", timedelta(seconds=1.5), signature=CHARGE.signature)


async def test_what_is_no_session_is_refused_with_the_way_to_one(settings: Settings) -> None:
    async with Client(settings) as client:
        with pytest.raises(TypeError, match=r"not a Client: `async with client\.sessions\.begin\(\) as session:`$"):
            enqueue(client, "tests.charge")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="not a async_sessionmaker: `async with sessions"):
            CHARGE.enqueue(client.sessions, 7)  # type: ignore[call-overload]


async def test_a_function_is_refused_where_a_call_is_meant(sessions: Sessions) -> None:
    async with sessions() as session:
        with pytest.raises(TypeError, match=r"^enqueue_many takes calls, made by fn\.call\(…\), not .*tests\.charge"):
            await enqueue_many(session, [CHARGE])  # type: ignore[list-item]
