"""`def` jobs: sync code over an ordinary Session that runs unchanged, in the attempt's one transaction."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import ForeignKey, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from tests.flow.helpers import a_work_with, claimed, run_new, start
from tests.support import a_job, attempts, row, state, until
from worker.core.context import JobContext, current_job
from worker.flow.holdings import Because
from worker.settings import Settings

Body = Callable[[Session], Any]
BODIES: list[Body] = []


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelf"

    name: Mapped[str] = mapped_column(primary_key=True)
    books: Mapped[list[Book]] = relationship(back_populates="shelf")


class Book(Base):
    __tablename__ = "book"

    title: Mapped[str] = mapped_column(primary_key=True)
    on: Mapped[str] = mapped_column(ForeignKey(Shelf.name))
    shelf: Mapped[Shelf] = relationship(back_populates="books")


@pytest.fixture(autouse=True)
async def tables(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("INSERT INTO shelf VALUES ('old')"))
        await connection.execute(text("INSERT INTO book VALUES ('Faust', 'old')"))


async def shelves(engine: AsyncEngine) -> list[tuple[str, ...]]:
    async with engine.connect() as connection:
        return [tuple(found) for found in await connection.execute(select(Book.on, Book.title).order_by(Book.title))]


def put(session: Session, *titles: str) -> None:
    session.add_all(Book(title=title, on="old") for title in titles)


# ── runs unchanged ──────────────────────────────────────────────────────────────────────────────────────────────────


def body(fn: Body) -> Body:
    BODIES.append(fn)
    return fn


@body
def leaves_the_commit_to_its_caller(session: Session) -> None:
    put(session, "Emma")


@body
def commits_in_the_middle_and_at_the_end(session: Session) -> None:
    put(session, "Emma")
    session.commit()
    put(session, "Kim")
    session.commit()


@body
def goes_on_after_an_integrity_error(session: Session) -> None:
    put(session, "Emma")
    session.commit()
    try:
        put(session, "Kim", "Faust")
        session.commit()
    except IntegrityError:
        session.rollback()
    put(session, "Ulysses")
    session.commit()


@body
def uses_begin_blocks(session: Session) -> None:
    with session.begin():
        put(session, "Emma")
    with suppress(KeyError), session.begin():
        put(session, "Kim")
        raise KeyError


@body
def uses_savepoints(session: Session) -> None:
    put(session, "Emma")
    for title in ("Faust", "Kim"):
        with suppress(IntegrityError), session.begin_nested():
            put(session, title)
            session.flush()


@body
def closes_its_session_and_goes_on(session: Session) -> None:
    put(session, "Emma")
    session.commit()
    put(session, "lost")
    session.flush()
    session.close()
    put(session, "Kim")
    session.commit()
    session.close()


@body
def uses_the_query_api_and_lazy_loads(session: Session) -> None:
    shelf = session.query(Shelf).filter_by(name="old").one()
    [faust] = shelf.books
    faust.shelf.books.append(Book(title="Emma"))
    session.query(Book).filter(Book.title == "Faust").update({"title": "Faust II"})


@body
def sees_after_its_commit_what_is_in_the_tables(session: Session) -> None:
    shelf = session.get_one(Shelf, "old")
    assert len(shelf.books) == 1
    put(session, "Emma")
    session.commit()
    put(session, f"{len(shelf.books)} books")


@pytest.mark.parametrize("fn", BODIES, ids=lambda fn: fn.__name__)
async def test_a_def_job_keeps_what_it_keeps_without_a_worker(
    engine: AsyncEngine, settings: Settings, fn: Body
) -> None:
    async with AsyncSession(engine) as session:
        await session.run_sync(fn)
        await session.commit()
    expected = await shelves(engine)
    async with engine.begin() as connection:
        await connection.execute(text("DELETE FROM book"))
        await connection.execute(text("INSERT INTO book VALUES ('Faust', 'old')"))

    async with a_work_with(settings, fn) as work:
        job_id, _ = await run_new(work, engine)

    assert await state(engine, job_id) == "succeeded"
    assert await shelves(engine) == expected != [("old", "Faust")]


async def test_a_def_job_that_raises_takes_its_own_commits_back(engine: AsyncEngine, settings: Settings) -> None:
    def fn(session: Session) -> None:
        put(session, "Emma")
        session.commit()
        raise ValueError("of my own")

    async with a_work_with(settings, fn) as work:
        job_id, _ = await run_new(work, engine)

    assert (await row(engine, job_id)).error == "ValueError: of my own"
    assert await shelves(engine) == [("old", "Faust")]


async def test_a_def_job_takes_arguments_and_its_result_is_stored(engine: AsyncEngine, settings: Settings) -> None:
    def fn(session: Session, fn: str, session_id: int = 1) -> dict[str, int]:
        return {fn: session_id}

    async with a_work_with(settings, fn) as work:
        job_id, _ = await run_new(work, engine, args={"fn": "seven"})
        assert work.jobs_engine.pool.checkedin() == 0  # type: ignore[attr-defined]  # the pool's own, a queue

    assert (await row(engine, job_id)).result == {"seven": 1}


async def test_a_def_job_knows_which_attempt_it_is(engine: AsyncEngine, settings: Settings) -> None:
    found: list[JobContext | None] = []

    def fn(session: Session) -> None:
        found.append(current_job())

    async with a_work_with(settings, fn) as work:
        job_id, _ = await run_new(work, engine, attempt=2)

    [context] = found
    assert context is not None
    assert (context.job_id, context.idempotency_key, context.attempt) == (job_id, str(job_id), 3)
    with pytest.raises(Exception, match="the Session it was given"):
        _ = context.session
    assert current_job() is None


# ── how it is ended ─────────────────────────────────────────────────────────────────────────────────────────────────


def sleeps(session: Session) -> None:
    put(session, "lost")
    session.execute(text("SELECT pg_sleep(600)"))


_SLEEPING = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND pid <> pg_backend_pid()"
    " AND datname = current_database() AND state = 'active'")  # fmt: skip


async def sleeping(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(_SLEEPING)).scalar_one())


async def nobody_sleeps(engine: AsyncEngine) -> bool:
    return await sleeping(engine) == 0


async def test_a_timeout_ends_the_statement_that_a_def_job_waits_for(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work_with(settings, sleeps, timeout=0.2) as work:
        job_id, _ = await run_new(work, engine)

        assert "ran longer than its timeout of 0.2 s" in (await row(engine, job_id)).error
        await until(lambda: nobody_sleeps(engine), "the statement has ended")
    assert await shelves(engine) == [("old", "Faust")]


async def test_a_cancellation_ends_the_statement_that_a_def_job_waits_for(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work_with(settings, sleeps) as work:
        (run,) = await claimed(work, await a_job(engine, name="tests.job"))
        task = start(work, run)
        await until(lambda: sleeping(engine), "the statement runs")

        assert run.cancel(Because.CANCEL_REQUESTED)
        await task

        assert await state(engine, run.claimed.held.job_id) == "cancelled"
        await until(lambda: nobody_sleeps(engine), "the statement has ended")
    assert await shelves(engine) == [("old", "Faust")]


@pytest.mark.parametrize("commits_first", [False, True])
async def test_a_cancellation_that_a_def_job_swallows_has_ended_what_it_wrote(
    engine: AsyncEngine, settings: Settings, commits_first: bool
) -> None:
    def fn(session: Session) -> None:
        if commits_first:
            put(session, "lost too")
            session.commit()
        try:
            sleeps(session)
        except BaseException:
            session.rollback()
        put(session, "late")
        session.commit()

    async with a_work_with(settings, fn, max_attempts=1) as work:
        (run,) = await claimed(work, await a_job(engine, name="tests.job"))
        task = start(work, run)
        await until(lambda: sleeping(engine), "the statement runs")
        run.cancel(Because.STOPPING)
        await task

    found = await row(engine, run.claimed.held.job_id)
    # What it called committed was in the transaction that the cancellation ended: it must not go on without it.
    assert found.state == ("failed" if commits_first else "succeeded")
    assert ("the connection was lost" in found.error) if commits_first else found.error is None
    assert await shelves(engine) == [("old", "Faust"), *([] if commits_first else [("old", "late")])]


async def test_sys_exit_in_a_def_job_fails_the_attempt(engine: AsyncEngine, settings: Settings) -> None:
    def fn(session: Session) -> None:
        sys.exit("no more")

    async with a_work_with(settings, fn) as work:
        job_id, _ = await run_new(work, engine)

    assert (await row(engine, job_id)).error == "SystemExit: no more"


async def test_a_def_job_that_returns_a_coroutine_fails_with_advice(engine: AsyncEngine, settings: Settings) -> None:
    async def forgotten() -> None: ...

    def fn(session: Session) -> Coroutine[Any, Any, None]:
        put(session, "lost")
        return forgotten()

    fn.__annotations__["return"] = Any
    async with a_work_with(settings, fn) as work:
        job_id, _ = await run_new(work, engine)

    (attempt,) = await attempts(engine, job_id)
    assert "returned coroutine, which nobody awaits; write `async def`" in attempt.error
    assert await shelves(engine) == [("old", "Faust")]


async def test_other_jobs_move_while_a_def_job_waits(engine: AsyncEngine, settings: Settings) -> None:
    def fn(session: Session) -> None:
        session.execute(text("SELECT pg_advisory_xact_lock(7)"))

    async with engine.connect() as connection, a_work_with(settings, fn) as work:
        await connection.execute(text("SELECT pg_advisory_lock(7)"))
        (run,) = await claimed(work, await a_job(engine, name="tests.job"))
        task = start(work, run)
        await asyncio.sleep(0)

        await connection.execute(text("SELECT pg_advisory_unlock(7)"))
        await task

        assert await state(engine, run.claimed.held.job_id) == "succeeded"
