"""Unique enqueue: while a job has a key there is no second one, and no enqueue that was promised is lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.flow.helpers import NAME, claimed, run_job
from tests.support import a_work, hints, row, state, until
from worker.core.errors import AlreadyEnqueued, ArgumentsInvalid
from worker.core.registry import Registry
from worker.core.states import JobState
from worker.db import transitions
from worker.db.failures import sqlstate_of
from worker.db.models import Job
from worker.flow.cancel import cancel
from worker.flow.enqueue import enqueue, enqueue_many
from worker.flow.handle import Handle
from worker.flow.job import JobFunction
from worker.flow.publish import Publisher
from worker.flow.work import Work
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]


async def bill(session: AsyncSession, invoice: int = 0) -> None: ...


BILL = JobFunction(bill, name=NAME)
REGISTRY = Registry()
REGISTRY.register(BILL)


async def place(sessions: Sessions, invoice: int = 0, key: str = "7", **options: Any) -> Handle:
    async with sessions.begin() as session:
        return await BILL.options(key=key, **options).enqueue(session, invoice)


@pytest.fixture
async def work(settings: Settings) -> Any:
    async with a_work(settings, REGISTRY) as work:
        yield work


async def count(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT count(*) FROM exarq.job"))).scalar_one())


async def later(engine: AsyncEngine, job_id: UUID, by: timedelta) -> None:
    """The time for which the job has its key is so much nearer."""
    async with engine.begin() as connection:
        await connection.execute(update(Job).where(Job.id == job_id).values(unique_until=Job.unique_until - by))


# ── for how long ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_is_taken_until_its_job_is_done(engine: AsyncEngine, sessions: Sessions, work: Work) -> None:
    first = await place(sessions)
    while_it_waits = await place(sessions)
    (run,) = await claimed(work, first.id)
    while_it_runs = await place(sessions)
    async with engine.begin() as connection:
        assert await transitions.snooze(connection, run.claimed.held, timedelta(0))
    while_it_waits_again = await place(sessions)
    await run_job(work, first.id)
    when_it_is_done = await place(sessions)

    assert first.happened == "created"
    assert {while_it_waits, while_it_runs, while_it_waits_again} == {Handle(first.id, NAME, "exists")}
    assert when_it_is_done.happened == "created"
    assert await count(engine) == 2


async def test_a_key_is_taken_until_its_job_has_started_and_a_retry_takes_it_no_more(
    engine: AsyncEngine, sessions: Sessions, work: Work
) -> None:
    first = await place(sessions, unique="until_started")
    assert (await place(sessions, unique="until_started")).id == first.id
    (run,) = await claimed(work, first.id)
    second = await place(sessions, unique="until_started")
    async with engine.begin() as connection:
        assert await transitions.snooze(connection, run.claimed.held, timedelta(0))
    third = await place(sessions, unique="until_started")

    assert (second.happened, third) == ("created", Handle(second.id, NAME, "exists"))
    assert [await state(engine, one.id) for one in (first, second)] == ["queued", "queued"]


async def test_a_key_with_a_time_is_taken_until_that_is_over_and_its_job_is_done(
    engine: AsyncEngine, sessions: Sessions, work: Work
) -> None:
    hour = timedelta(hours=1)
    first = await place(sessions, unique=hour)
    await run_job(work, first.id)
    when_it_is_done = await place(sessions, unique=hour)
    await later(engine, first.id, hour)
    when_that_is_over = await place(sessions, unique=hour)
    await later(engine, when_that_is_over.id, hour)
    over_and_not_done = await place(sessions, unique=hour)

    assert when_it_is_done == Handle(first.id, NAME, "exists")
    assert when_that_is_over.happened == "created"
    assert over_and_not_done == Handle(when_that_is_over.id, NAME, "exists")
    assert await count(engine) == 2


@pytest.mark.leaves_hints  # nobody claims here
async def test_a_job_whose_key_is_taken_for_a_time_is_not_pruned_before(
    engine: AsyncEngine, sessions: Sessions, work: Work
) -> None:
    first = await place(sessions, unique=timedelta(hours=1))
    await run_job(work, first.id)

    async def prune() -> int:
        async with engine.begin() as connection:
            return await transitions.prune(connection, JobState.SUCCEEDED, keep=timedelta(0), batch=10)

    assert await prune() == 0
    await later(engine, first.id, timedelta(hours=1))
    assert await prune() == 1


async def test_another_name_and_a_job_without_a_key_are_nobodys_conflict(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    await place(sessions)
    async with sessions.begin() as session:
        other = await enqueue(session, "other.job", key="7")
        plain = [await BILL.enqueue(session), await BILL.enqueue(session)]

    assert [one.happened for one in (other, *plain)] == ["created"] * 3
    assert await count(engine) == 4


# ── what becomes of the second ──────────────────────────────────────────────────────────────────────────────────────


async def test_raise_names_the_job_that_has_the_key_and_leaves_the_transaction_as_it_was(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    first = await place(sessions)

    async with sessions.begin() as session:
        with pytest.raises(
            AlreadyEnqueued, match=rf"'7' is enqueued already: job {first.id} is queued; enq"
        ) as refused:
            await enqueue_many(
                session,
                [BILL.call(1), BILL.options(key="6").call(2), BILL.options(key="7", on_conflict="raise").call(3)],
            )
        after = await BILL.enqueue(session, 4)

    assert (refused.value.job_id, refused.value.state) == (first.id, "queued")
    assert await count(engine) == 2
    assert await state(engine, after.id) == "queued"


async def test_replace_gives_the_job_that_waits_new_arguments_and_a_new_time(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis, publisher: Publisher
) -> None:
    first = await place(sessions, 1, on_conflict="replace", delay=20)
    await publisher.flush()
    late = (await hints(redis))[str(first.id)]

    second = await place(sessions, 2, on_conflict="replace", priority=5, expires=60)

    await publisher.flush()
    found = await row(engine, first.id)
    assert second == Handle(first.id, NAME, "replaced")
    assert found.args == {"invoice": 2}
    assert found.run_at <= datetime.now(UTC)
    assert found.expires_at - found.run_at == timedelta(seconds=60)
    assert (await hints(redis))[str(first.id)] <= late - 19_000
    assert await count(engine) == 1


async def test_replace_lets_what_has_started_run_and_enqueues_anew(sessions: Sessions, work: Work) -> None:
    first = await place(sessions, 1, on_conflict="replace")
    (run,) = await claimed(work, first.id)

    second = await place(sessions, 2, on_conflict="replace")

    assert second.happened == "created"
    assert run.claimed.args == '{"invoice": 1}'
    await run_job(work, second.id)
    await transitions_to_an_end(work, first.id)


async def test_replace_leaves_alone_what_has_started_and_waits_for_its_next_attempt(
    engine: AsyncEngine, sessions: Sessions, work: Work
) -> None:
    first = await place(sessions, 1, unique="until_done")
    (run,) = await claimed(work, first.id)
    async with engine.begin() as connection:
        assert await transitions.snooze(connection, run.claimed.held, timedelta(0))
    work.holdings.let_go(run.claimed.held)

    with pytest.raises(AlreadyEnqueued, match=f"{first.id} is queued"):
        await place(sessions, 2, on_conflict="replace")
    assert (await row(engine, first.id)).args == {"invoice": 1}


async def test_replace_raises_where_the_new_arguments_would_be_lost(sessions: Sessions, work: Work) -> None:
    first = await place(sessions, 1, unique="until_done")
    await claimed(work, first.id)

    with pytest.raises(AlreadyEnqueued, match="is running"):
        await place(sessions, 2, on_conflict="replace")
    await transitions_to_an_end(work, first.id)


async def transitions_to_an_end(work: Work, job_id: UUID) -> None:
    for held, run in work.holdings.runs().items():
        if held.job_id == job_id:
            async with work.processor.begin() as connection:
                await transitions.cancel(connection, held, "the test is over")
            work.holdings.let_go(run.claimed.held)


async def test_many_are_enqueued_at_once_and_each_key_once(engine: AsyncEngine, sessions: Sessions) -> None:
    there = await place(sessions, 0, key="a")
    calls = [BILL.options(key=key).call(number) for number, key in enumerate("bacab")]
    replacing = [BILL.options(key="r", on_conflict="replace").call(number) for number in range(3)]

    async with sessions.begin() as session:
        handles = await enqueue_many(session, [*calls, BILL.call(9), *replacing])

    assert [one.happened for one in handles] == [
        *("created", "exists", "created", "exists", "exists"),
        *("created", "created", "replaced", "replaced"),
    ]
    assert handles[1].id == handles[3].id == there.id
    assert handles[4].id == handles[0].id
    assert (await row(engine, handles[6].id)).args == {"invoice": 2}
    assert await count(engine) == 5


# ── what others do meanwhile ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("commits", [True, False])
async def test_an_enqueue_waits_for_the_one_that_has_the_key_and_is_not_committed(
    engine: AsyncEngine, sessions: Sessions, commits: bool
) -> None:
    async with sessions() as session:
        first = await BILL.options(key="7").enqueue(session)
        second = asyncio.create_task(place(sessions))
        await until(lambda: somebody_waits(engine), "the second waits for the first")
        await (session.commit() if commits else session.rollback())

    assert (await second).happened == ("exists" if commits else "created")
    assert ((await second).id == first.id) is commits
    assert await count(engine) == 1


async def somebody_waits(engine: AsyncEngine, many: int = 1) -> bool:
    async with engine.connect() as connection:
        found = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return int((await connection.execute(text(found))).scalar_one()) >= many


async def test_a_replaced_job_starts_only_after_the_commit_of_who_has_replaced_it(
    engine: AsyncEngine, sessions: Sessions, work: Work, redis: ArqRedis, publisher: Publisher
) -> None:
    """Else it could run without what its second producer has written, and nobody would run for that."""
    first = await place(sessions, on_conflict="replace")
    await publisher.flush()
    await redis.zadd("arq:queue", {str(first.id): 4e12})  # a claim has met the lock and hidden the hint

    async with sessions.begin() as session:
        assert (await BILL.options(key="7", on_conflict="replace").enqueue(session)).id == first.id
        before = await claimed(work, first.id)
    after = await claimed(work, first.id)

    await publisher.flush()
    assert (before, len(after)) == ([], 1)
    assert (await hints(redis))[str(first.id)] < 4e12
    await transitions_to_an_end(work, first.id)


@pytest.mark.parametrize("unique", ["until_started", "until_done"])
async def test_a_skipped_job_starts_whoever_has_found_it_and_not_committed(
    sessions: Sessions, work: Work, unique: Any
) -> None:
    """Else producers of one key whose transactions overlap would keep its job from ever starting."""
    first = await place(sessions, unique=unique)
    replaced_beside = BILL.options(key="8", on_conflict="replace")
    await place(sessions, key="8", on_conflict="replace")

    async with sessions.begin() as session:
        skipping = BILL.options(key="7", unique=unique)
        assert (await skipping.enqueue(session)).id == first.id
        await enqueue_many(session, [skipping.call(), replaced_beside.call()])
        (run,) = await claimed(work, first.id)

    assert run.claimed.held.job_id == first.id
    await transitions_to_an_end(work, first.id)


async def test_where_a_transaction_sees_no_later_commits_a_conflict_is_a_serialization_failure(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    serializable = async_sessionmaker(
        engine.execution_options(isolation_level="REPEATABLE READ"), info=sessions.kw["info"]
    )
    async with serializable() as session:
        await session.execute(text("SELECT 1"))
        await place(sessions)
        with pytest.raises(DBAPIError) as refused:
            await BILL.options(key="7").enqueue(session)

    assert sqlstate_of(refused.value) == "40001"


async def test_a_rollback_to_a_savepoint_frees_the_key(engine: AsyncEngine, sessions: Sessions) -> None:
    async with sessions.begin() as session:
        savepoint = await session.begin_nested()
        undone = await BILL.options(key="7").enqueue(session)
        await savepoint.rollback()
        kept = await BILL.options(key="7").enqueue(session)

    assert kept.happened == "created"
    assert (await state(engine, undone.id), await state(engine, kept.id)) == (None, "queued")


# ── what can never run has no key ───────────────────────────────────────────────────────────────────────────────────


async def expire(engine: AsyncEngine, job_id: UUID) -> None:
    async with engine.begin() as connection:
        await connection.execute(update(Job).where(Job.id == job_id).values(expires_at=text("now()")))


@pytest.mark.parametrize("unique", ["until_started", "until_done", timedelta(hours=1)])
async def test_an_enqueue_cancels_a_job_that_has_expired_under_its_key(
    engine: AsyncEngine, sessions: Sessions, unique: Any
) -> None:
    first = await place(sessions, 1, unique=unique, expires=60)
    there = await place(sessions, 1, unique=unique)
    await expire(engine, first.id)

    second = await place(sessions, 2, unique=unique)

    found = await row(engine, first.id)
    assert (there.happened, second.happened) == ("exists", "created")
    assert (found.state, found.unique_until) == ("cancelled", None)
    assert found.finished_at is not None
    assert str(found.error).startswith("expired: no attempt may start after 20")


async def test_a_job_that_never_ran_gives_back_the_key_it_had_for_a_time(
    engine: AsyncEngine, sessions: Sessions, work: Work
) -> None:
    hour = timedelta(hours=1)
    first = await place(sessions, unique=hour)
    async with sessions.begin() as session:
        await cancel(session, first.id)
    second = await place(sessions, unique=hour, expires=60)
    await expire(engine, second.id)
    await run_job(work, second.id)
    third = await place(sessions, unique=hour)
    (run,) = await claimed(work, third.id)
    async with work.processor.begin() as connection:
        await transitions.cancel(connection, run.claimed.held, "somebody asked")
    work.holdings.let_go(run.claimed.held)
    fourth = await place(sessions, unique=hour)

    assert [await state(engine, one.id) for one in (first, second, third)] == ["cancelled"] * 3
    assert [one.happened for one in (second, third, fourth)] == ["created", "created", "exists"]


async def test_replace_gives_a_job_that_has_expired_another_deadline(engine: AsyncEngine, sessions: Sessions) -> None:
    first = await place(sessions, 1, on_conflict="replace", expires=60)
    await expire(engine, first.id)

    second = await place(sessions, 2, on_conflict="replace")

    found = await row(engine, first.id)
    assert second == Handle(first.id, NAME, "replaced")
    assert (found.state, found.expires_at, found.args) == ("queued", None, {"invoice": 2})


async def test_keys_whose_time_is_over_are_taken_in_one_order_too(
    engine: AsyncEngine, sessions: Sessions, work: Work
) -> None:
    """Else who waits for `a` could hold `b`, for which the holder of `a` waits."""
    hour = timedelta(hours=1)
    over = await place(sessions, key="b", unique=hour)
    await run_job(work, over.id)
    await later(engine, over.id, hour)

    async def place_each(*together: str) -> list[Handle]:
        async with sessions.begin() as session:
            calls = [[BILL.options(key=key, unique=hour).call() for key in keys] for keys in together]
            return [handle for some in calls for handle in await enqueue_many(session, some)]

    async with sessions.begin() as holder:
        await holder.execute(select(Job).where(Job.id == over.id).with_for_update())
        first = asyncio.create_task(place_each("ba"))
        await until(lambda: somebody_waits(engine), "the first waits for the row of b")
        second = asyncio.create_task(place_each("a", "b"))
        await until(lambda: somebody_waits(engine, 2), "the second waits for a key")

    assert [one.happened for one in await first] == ["created", "created"]
    assert await second == [replace(one, happened="exists") for one in reversed(await first)]


# ── what cannot be ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": ""}, "key must be 1 to 1,000 bytes of UTF-8, not 0"),
        ({"key": "é" * 501}, "key must be 1 to 1,000 bytes of UTF-8, not 1,002; hash what is longer"),
        ({"key": "a\0b"}, "key has a NUL"),
        ({"key": "a\udc80"}, "lone surrogate"),
        ({"key": 7}, "key must be text, not int"),
        ({"unique": "until_done"}, "need a key, for example key='invoice-7'"),
        ({"on_conflict": "skip"}, "need a key"),
        ({"key": "7", "unique": "for_ever"}, "'until_started', 'until_done' or a timedelta, not 'for_ever'"),
        ({"key": "7", "unique": 60}, "or a timedelta, not '60'"),
        ({"key": "7", "unique": timedelta(0)}, "more than 0 seconds"),
        ({"key": "7", "on_conflict": "ignore"}, "'skip', 'replace' or 'raise', not 'ignore'"),
        ({"key": "7", "on_conflict": "replace", "unique": "until_done"}, "needs unique='until_started'"),
        ({"kee": "7"}, "an enqueue has no option 'kee'; did you mean 'key'"),
    ],
)
def test_options_that_cannot_be_are_refused_with_advice(options: Any, said: str) -> None:
    with pytest.raises(ArgumentsInvalid, match=said.replace("(", r"\(")):
        BILL.options(**options)


async def test_the_longest_key_of_the_longest_name_fits_the_index(engine: AsyncEngine, sessions: Sessions) -> None:
    async with sessions.begin() as session:
        for _ in range(2):
            await enqueue(session, "\N{GRINNING FACE}" * 200, key="\N{GRINNING FACE}" * 250)

    assert await count(engine) == 1


async def test_however_often_a_job_is_replaced_it_is_due_within_the_longest_delay(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    bounded: dict[str, Any] = {"on_conflict": "replace", "longest_delay": 90}
    first = await row(engine, (await place(sessions, delay=60, **bounded)).id)
    second = await row(engine, (await place(sessions, delay=70, **bounded)).id)
    last = await row(engine, (await place(sessions, delay=3600, **bounded)).id)

    assert first.run_at < second.run_at < last.run_at
    assert last.run_at == last.first_due_at == first.enqueued_at + timedelta(seconds=90)


async def test_a_job_is_due_within_the_longest_delay_also_where_it_replaces_none(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    made = await row(engine, (await place(sessions, delay=3600, on_conflict="replace", longest_delay=90)).id)

    assert made.run_at == made.first_due_at == made.enqueued_at + timedelta(seconds=90)


def test_a_longest_delay_bounds_only_what_replaces() -> None:
    with pytest.raises(ArgumentsInvalid, match="longest_delay bounds what on_conflict='replace' puts off"):
        BILL.options(key="k", longest_delay=90)
