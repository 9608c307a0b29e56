"""What jobs do with their session: each is run by an attempt and by plain SQLAlchemy, and must keep the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

Body = Callable[[AsyncSession], Awaitable[None]]
CASES: list[Body] = []


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    word: Mapped[str] = mapped_column(primary_key=True)


def case(body: Body) -> Body:
    CASES.append(body)
    return body


def add(session: AsyncSession | Session, *words: str) -> None:
    session.add_all(Note(word=word) for word in words)


async def write(session: AsyncSession, word: str) -> None:
    await session.execute(insert(Note).values(word=word))


@case
async def does_nothing(session: AsyncSession) -> None:
    pass


@case
async def only_reads(session: AsyncSession) -> None:
    await session.scalars(select(Note))


@case
async def adds_without_a_flush(session: AsyncSession) -> None:
    add(session, "a")


@case
async def flushes(session: AsyncSession) -> None:
    add(session, "a")
    await session.flush()


@case
async def executes_without_the_orm(session: AsyncSession) -> None:
    await write(session, "a")


@case
async def uses_session_begin(session: AsyncSession) -> None:
    async with session.begin():
        add(session, "a")


@case
async def uses_session_begin_twice(session: AsyncSession) -> None:
    async with session.begin():
        add(session, "a")
    async with session.begin():
        add(session, "b")


@case
async def fails_inside_session_begin_and_goes_on(session: AsyncSession) -> None:
    with suppress(ValueError):
        async with session.begin():
            await write(session, "a")
            raise ValueError
    await write(session, "b")


@case
async def commits_in_the_middle(session: AsyncSession) -> None:
    add(session, "a")
    await session.commit()
    add(session, "b")


@case
async def commits_twice(session: AsyncSession) -> None:
    add(session, "a")
    await session.commit()
    add(session, "b")
    await session.commit()


@case
async def commits_without_having_done_anything(session: AsyncSession) -> None:
    await session.commit()
    add(session, "a")


@case
async def commits_then_rolls_back(session: AsyncSession) -> None:
    add(session, "a")
    await session.commit()
    add(session, "b")
    await session.flush()
    await session.rollback()


@case
async def commits_then_rolls_back_then_goes_on(session: AsyncSession) -> None:
    add(session, "a")
    await session.commit()
    await write(session, "b")
    await session.rollback()
    await write(session, "c")
    await session.commit()
    await write(session, "d")
    await session.rollback()


@case
async def rolls_back_without_a_commit(session: AsyncSession) -> None:
    await write(session, "a")
    await session.rollback()


@case
async def rolls_back_and_goes_on(session: AsyncSession) -> None:
    await write(session, "a")
    await session.rollback()
    await write(session, "b")


@case
async def uses_a_savepoint(session: AsyncSession) -> None:
    add(session, "a")
    async with session.begin_nested():
        add(session, "b")


@case
async def fails_inside_a_savepoint(session: AsyncSession) -> None:
    add(session, "a")
    with suppress(IntegrityError):
        async with session.begin_nested():
            await write(session, "b")
            await write(session, "a")
    add(session, "c")


@case
async def fails_inside_a_savepoint_after_a_commit(session: AsyncSession) -> None:
    await write(session, "a")
    await session.commit()
    with suppress(IntegrityError):
        async with session.begin_nested():
            await write(session, "b")
            await write(session, "a")
    await write(session, "c")


@case
async def commits_inside_a_savepoint(session: AsyncSession) -> None:
    await write(session, "a")
    await session.begin_nested()
    await write(session, "b")
    await session.commit()
    await write(session, "c")
    await session.rollback()


@case
async def rolls_back_after_an_integrity_error(session: AsyncSession) -> None:
    add(session, "a", "b")
    await session.flush()
    with suppress(IntegrityError):
        await write(session, "a")
    await session.rollback()
    await write(session, "c")


@case
async def commits_then_rolls_back_after_an_integrity_error(session: AsyncSession) -> None:
    await write(session, "a")
    await session.commit()
    await write(session, "b")
    with suppress(IntegrityError):
        await write(session, "a")
    await session.rollback()
    await write(session, "c")


@case
async def commits_then_rolls_back_after_a_commit_that_failed(session: AsyncSession) -> None:
    await write(session, "a")
    await session.commit()
    add(session, "a", "b")
    with suppress(IntegrityError):
        await session.commit()
    await session.rollback()
    await write(session, "c")


@case
async def closes_and_goes_on(session: AsyncSession) -> None:
    await write(session, "a")
    await session.close()
    await write(session, "b")


@case
async def commits_closes_and_goes_on(session: AsyncSession) -> None:
    await write(session, "a")
    await session.commit()
    await write(session, "b")
    await session.close()
    await write(session, "c")


@case
async def closes_at_the_end(session: AsyncSession) -> None:
    async with session:
        await write(session, "a")
        await session.commit()
        await write(session, "b")


@case
async def resets_and_goes_on(session: AsyncSession) -> None:
    await write(session, "a")
    await session.reset()
    await write(session, "b")


@case
async def runs_sync_code_that_commits_and_rolls_back(session: AsyncSession) -> None:
    def legacy(session: Session) -> None:
        add(session, "a")
        session.commit()
        add(session, "a")
        with suppress(IntegrityError):
            session.commit()
        session.rollback()
        add(session, "b")
        session.commit()
        add(session, "c")
        session.flush()
        session.rollback()

    await session.run_sync(legacy)


@case
async def reads_after_a_commit(session: AsyncSession) -> None:
    await write(session, "a")
    await session.commit()
    found = (await session.scalars(select(Note.word))).all()
    await write(session, f"{len(found)}")


@case
async def streams(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO note SELECT 'n' || g FROM generate_series(1, 50) g"))
    async for word in await session.stream_scalars(select(Note.word).execution_options(yield_per=10)):
        if word == "n7":
            add(session, "found")


@case
async def commits_while_a_savepoint_of_the_connection_is_open(session: AsyncSession) -> None:
    await write(session, "a")
    await session.commit()
    await write(session, "b")
    await (await session.connection()).begin_nested()
    await write(session, "c")
    await session.commit()
    await write(session, "d")
    await session.rollback()


@case
async def expunges_and_merges(session: AsyncSession) -> None:
    note = Note(word="a")
    session.add(note)
    await session.flush()
    session.expunge_all()
    await session.merge(Note(word="b"))
    await session.commit()
    await session.delete(await session.get_one(Note, "a"))
