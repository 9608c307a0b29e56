"""Jobs that tests of the testing helpers enqueue, each of a few lines."""

from __future__ import annotations

from datetime import date, timedelta
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tests.flow.helpers import note
from worker import Cancel, Fail, JobContext, Retry, Snooze, job


@job(name="t.write")
async def write(session: AsyncSession, word: str, again: int = 0) -> str:
    await note(session, word)
    if again:
        await write.enqueue(session, word + "!", again - 1)
    return word.upper()


@job(name="t.book", queue="books")
async def book(ctx: JobContext, order_id: UUID, on: date | None = None) -> date | None:
    await note(ctx.session, f"{order_id} {ctx['shop']}")
    return on


@job(name="t.end")
async def end(session: AsyncSession, how: str) -> None:
    await note(session, how)
    match how:
        case "raise":
            raise ValueError("as asked")
        case "retry":
            raise Retry(delay=5)
        case "snooze":
            raise Snooze(delay=60)
        case "cancel":
            raise Cancel("no longer wanted")
        case "fail":
            raise Fail("hopeless")


@job(name="t.nothing")
async def nothing(ctx: JobContext) -> int:
    return ctx.attempt


@job(name="t.twice", max_attempts=3)
async def fails_twice(ctx: JobContext) -> None:
    await note(ctx.session, f"attempt {ctx.attempt}")
    if ctx.attempt < 3:
        raise ConnectionError("not yet")


@job(name="t.slow", timeout=0.05)
async def slow(session: AsyncSession) -> None:
    await note(session, "slow")
    await session.execute(text("SELECT pg_sleep(60)"))


@job(name="t.for_ever")
async def for_ever(session: AsyncSession) -> None:
    await for_ever.options(delay=timedelta(hours=1)).enqueue(session)


@job(name="t.hangs_up")
async def hangs_up(session: AsyncSession) -> None:
    connection = await session.connection()
    raw = (await connection.get_raw_connection()).driver_connection
    await raw._raw.close()  # type: ignore[union-attr]  # what a server does that goes away


@job(name="t.legacy")
def legacy(session: Session, word: str) -> str:
    session.execute(text("INSERT INTO note VALUES (:word)"), {"word": word})
    session.commit()
    return word


@job(name="t.read_only", read_only=True, isolation="SERIALIZABLE")
async def writes_read_only(session: AsyncSession) -> None:
    await note(session, "read only")


@job(name="t.own", commits="own")
async def commits_and_raises(session: AsyncSession) -> None:
    await note(session, "committed")
    await session.commit()
    await note(session, "not committed")
    raise ValueError("after a commit")


@job(name="t.throws_away")
async def throws_its_connection_away(session: AsyncSession) -> None:
    await note(session, "thrown away")
    await (await session.connection()).invalidate()
    raise ConnectionError("the connection cannot be trusted")
