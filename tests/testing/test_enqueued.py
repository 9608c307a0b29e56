"""What was enqueued: asserted by what matters, told with the nearest when it is missing."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.testing.jobs_for_tests import book, end, nothing, write
from worker import ArgumentsInvalid, Client, enqueue, enqueue_many
from worker.testing import assert_enqueued, assert_not_enqueued, drain, enqueued

ORDER = UUID("0b7e4b0c-6c9b-4f0e-8a37-1f1c3d1b6f10")
TOMORROW = datetime.now(UTC) + timedelta(days=1)  # not in a test's id: every test process must have the same


@pytest.fixture
async def three(session: AsyncSession) -> None:
    await write.enqueue(session, "a")
    await book.options(delay=60).enqueue(session, ORDER, on=date(2026, 12, 24))
    await write.options(queue="slow", run_at=TOMORROW).enqueue(session, "b", again=2)


@pytest.mark.usefixtures("three")
async def test_what_is_not_named_may_be_anything(session: AsyncSession) -> None:
    assert [job.args["word"] for job in await assert_enqueued(session, write)] == ["a", "b"]
    assert len(await assert_enqueued(session, write, again=0)) == 1
    await assert_enqueued(session, write, count=2)
    await assert_enqueued(session, book, order_id=ORDER, on=date(2026, 12, 24), queue="books", delay=60)
    await assert_enqueued(session, book, order_id=ORDER, delay=timedelta(minutes=1), count=1)
    await assert_enqueued(session, write, queue="slow", run_at=TOMORROW, again=2)
    await assert_enqueued(session, "t.write", word="a", args={"again": 0})


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    "wanted",
    [
        {"word": "c"},
        {"word": "a", "again": 1},
        {"word": "a", "queue": "slow"},
        {"word": "a", "delay": 5},
        {"word": "b", "run_at": TOMORROW + timedelta(minutes=1)},
        {"word": "a", "count": 2},
        {"count": 1},
    ],
    ids=lambda wanted: "-".join(wanted),
)
async def test_what_is_named_must_be_so(session: AsyncSession, wanted: dict[str, object]) -> None:
    with pytest.raises(AssertionError, match=r"t\.write"):
        await assert_enqueued(session, write, **wanted)  # type: ignore[arg-type]


@pytest.mark.usefixtures("three")
async def test_the_message_has_the_nearest_first(session: AsyncSession) -> None:
    with pytest.raises(AssertionError) as raised:
        await assert_enqueued(session, write, word="b", again=3, queue="slow")

    said, nearest, *others = str(raised.value).splitlines()
    assert said == "no job t.write(word='b', again=3) with queue 'slow' was enqueued; the nearest of 3:"
    assert nearest.startswith("  t.write(word='b', again=2)  queue 'slow', delay ")
    assert others == [
        "  t.write(word='a', again=0)  queue 'default', queued",
        f"  t.book(order_id={ORDER!r}, on=datetime.date(2026, 12, 24))  queue 'books', delay 0:01:00, queued",
    ]


async def test_the_message_has_a_few_of_many_and_says_when_there_is_nothing(session: AsyncSession) -> None:
    with pytest.raises(AssertionError, match="nothing was; is this the session, or the database, that the code under"):
        await assert_enqueued(session, nothing)

    await enqueue_many(session, [write.call(f"{number}") for number in range(12)])

    with pytest.raises(AssertionError) as raised:
        await assert_enqueued(session, write, count=3)
    assert str(raised.value).startswith("12 instead of 3 t.write() was enqueued; the nearest of 12:")
    assert str(raised.value).endswith("\n  … and 2 more")


@pytest.mark.usefixtures("three")
async def test_what_is_not_to_be_enqueued_is_told_when_it_was(session: AsyncSession) -> None:
    await assert_not_enqueued(session, nothing)
    await assert_not_enqueued(session, write, word="c")
    await assert_not_enqueued(session, write, word="a", queue="slow")
    with pytest.raises(
        AssertionError, match=r"t.write\(word='a'\) was enqueued:\n  t.write\(word='a', again=0\)  queue"
    ):
        await assert_not_enqueued(session, write, word="a")
    with pytest.raises(AssertionError, match="any job was enqueued"):
        await assert_not_enqueued(session)


async def test_a_job_stays_enqueued_whatever_became_of_it(session: AsyncSession) -> None:
    await end.enqueue(session, "fail")
    await nothing.enqueue(session)
    await drain(session, raises=False)

    assert [(job.name, job.state) for job in await enqueued(session)] == [
        ("t.end", "failed"),
        ("t.nothing", "succeeded"),
    ]
    assert [job.name for job in await enqueued(session, nothing)] == ["t.nothing"]


async def test_an_argument_that_the_job_does_not_have_is_a_mistake_in_the_test(session: AsyncSession) -> None:
    with pytest.raises(ArgumentsInvalid, match=r"t.write: unknown argument 'wrod'; did you mean 'word'"):
        await assert_not_enqueued(session, write, wrod="a")


async def test_a_job_that_is_known_by_name_only_is_compared_as_json(session: AsyncSession) -> None:
    await enqueue(session, "elsewhere.ship", {"order": str(ORDER), "queue": 7})

    await assert_enqueued(session, "elsewhere.ship", order=ORDER, args={"queue": 7})
    await assert_not_enqueued(session, "elsewhere.ship", args={"queue": "7"})


async def test_a_client_sees_what_is_committed(exarq_client: Client) -> None:
    async with exarq_client.sessions() as session:
        await write.enqueue(session, "a")
        await assert_not_enqueued(exarq_client)
        await session.commit()

    await assert_enqueued(exarq_client, write, word="a")
