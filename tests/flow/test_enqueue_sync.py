"""Enqueue from sync code: a classic Session on psycopg, a thread, a forked child, and code inside run_sync."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import TypeVar

import pytest
from arq.connections import ArqRedis
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.flow.helpers import NAME, a_work_with, note, notes, registry_of, run_job
from tests.support import a_job, heard, hints, row, run_all, state
from worker.broker.connection import connect_now
from worker.core.errors import AlreadyEnqueued, AutocommitRefused, SchemaNotMigrated
from worker.core.registry import Registry
from worker.db.ids import uuid7
from worker.flow import publish_now
from worker.flow.cancel import cancel
from worker.flow.enqueue import enqueue, enqueue_many
from worker.flow.handle import Handle
from worker.flow.job import JobFunction
from worker.flow.publish import Publisher
from worker.flow.publish_now import SyncPublisher
from worker.observe.events import PublishFailed
from worker.settings import Settings

T = TypeVar("T")
Sessions = async_sessionmaker[AsyncSession]
SyncSessions = sessionmaker[Session]

pytestmark = pytest.mark.usefixtures("note_table")


async def write(session: AsyncSession, word: str) -> None:
    await note(session, word)


JOB = JobFunction(write, name=NAME)

SCRIPT = f"""
import os, sys
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from worker import enqueue
from worker.flow import publish_now

publish_now._ANSWER_LIMIT *= 600  # this is about who publishes, not about how long a loaded machine takes

def commit(word):
    engine = create_engine(sys.argv[1])
    with Session(engine) as session, session.begin():
        made = enqueue(session, "{NAME}", {{"word": word}})
        os.write(1, f"{{made.id}}\\n".encode())  # in one piece: the child writes at the same time
    engine.dispose()

commit("parent")
child = os.fork()
commit("child" if child == 0 else "parent again")
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture
async def sync_sessions(database_url: str, settings: Settings) -> AsyncIterator[SyncSessions]:
    """The session factory of a classic service."""
    engine = create_engine(psycopg(database_url))
    publisher = SyncPublisher(
        connect_now(str(settings.redis.url), timeout=timedelta(seconds=5)), lease=settings.worker.lease
    )
    yield sessionmaker(engine, info=publisher.info)
    publisher.close()
    engine.dispose()


def psycopg(url: str) -> str:
    return make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


async def elsewhere(work: Callable[[], T]) -> T:
    """Do this in a thread, where no event loop runs."""
    return await asyncio.to_thread(work)


def registry() -> Registry:
    return registry_of(write)


# ── outside of a loop ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_plain_script_and_its_forked_child_enqueue_and_a_worker_runs_their_jobs(
    engine: AsyncEngine, database_url: str, settings: Settings, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXARQ_DATABASE_URL", database_url)
    monkeypatch.setenv("EXARQ_REDIS_URL", str(settings.redis.url))
    command = [sys.executable, "-W", "error", "-c", SCRIPT, psycopg(database_url)]

    done = await elsewhere(lambda: subprocess.run(command, capture_output=True, text=True, timeout=100, check=False))

    assert (done.returncode, done.stderr) == (0, "")
    assert set(await hints(redis)) == set(done.stdout.split())
    await run_all(settings, registry())
    assert await notes(engine) == ["child", "parent", "parent again"]


async def test_what_commits_is_published_and_what_is_rolled_back_never_was(
    engine: AsyncEngine, sync_sessions: SyncSessions, redis: ArqRedis
) -> None:
    def work() -> tuple[list[Handle], list[Handle]]:
        with sync_sessions() as session:
            kept = [JOB.enqueue(session, "a"), *enqueue_many(session, [JOB.call("b"), JOB.call("c")])]
            with session.begin_nested() as savepoint:
                lost = [JOB.enqueue(session, "d")]
                savepoint.rollback()
            session.commit()
            lost.append(JOB.options(queue="other").enqueue(session, "e"))
            session.rollback()
        registry = scoped_session(sync_sessions)
        kept.append(JOB.enqueue(registry, "f"))
        registry.commit()
        registry.remove()
        return kept, lost

    kept, lost = await elsewhere(work)

    assert set(await hints(redis)) == {str(handle.id) for handle in kept}
    assert [await state(engine, handle.id) for handle in kept] == ["queued"] * 4
    assert [await state(engine, handle.id) for handle in lost] == [None, None]


async def test_every_option_says_the_same_as_from_async_code(engine: AsyncEngine, sync_sessions: SyncSessions) -> None:
    call = JOB.options(delay=60, queue="q", priority=2, expires=timedelta(hours=1), key="k", on_conflict="replace")

    def work() -> list[Handle]:
        with sync_sessions.begin() as session:
            return [call.enqueue(session, "a"), call.enqueue(session, "b")]

    first, second = await elsewhere(work)

    found = await row(engine, first.id)
    assert (first.id, second.happened) == (second.id, "replaced")
    assert (found.args, found.queue, found.priority, found.unique_key) == ({"word": "b"}, "q", 2, "k")
    assert (found.expires_at - found.run_at, found.run_at - found.enqueued_at > timedelta(seconds=59)) == (
        timedelta(hours=1),
        True,
    )


async def test_a_taken_key_raises_and_the_transaction_goes_on(sync_sessions: SyncSessions, engine: AsyncEngine) -> None:
    def work() -> Handle:
        with sync_sessions.begin() as session:
            JOB.options(key="k").enqueue(session, "a")
            with pytest.raises(AlreadyEnqueued):
                JOB.options(key="k", on_conflict="raise").enqueue(session, "b")
            return JOB.enqueue(session, "c")

    assert await state(engine, (await elsewhere(work)).id) == "queued"


async def test_a_sync_session_cancels(engine: AsyncEngine, sync_sessions: SyncSessions) -> None:
    job = await a_job(engine)

    def work() -> list[str]:
        with sync_sessions.begin() as session:
            return [cancel(session, one).outcome for one in (job, uuid7())]

    assert await elsewhere(work) == ["cancelled", "unknown"]
    assert await state(engine, job) == "cancelled"


async def test_autocommit_and_missing_tables_are_refused_as_from_async_code(
    engine: AsyncEngine, database_url: str, sync_sessions: SyncSessions
) -> None:
    def loose() -> None:
        engine = create_engine(psycopg(database_url), isolation_level="AUTOCOMMIT")
        with Session(engine, info=sync_sessions.kw["info"]) as session, pytest.raises(AutocommitRefused):
            enqueue(session, NAME)
        engine.dispose()

    def without_tables() -> None:
        with sync_sessions() as session, pytest.raises(SchemaNotMigrated):
            enqueue(session, NAME)

    await elsewhere(loose)
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA exarq CASCADE"))
    await elsewhere(without_tables)


async def test_a_redis_that_is_away_is_told_of_once_and_keeps_no_commit(
    engine: AsyncEngine, database_url: str, settings: Settings, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_now, "_SILENCE", timedelta(seconds=1_000))
    url = f"redis://127.0.0.1:{closed_port}/0"
    away = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": url})})

    def work() -> list[Handle]:
        publisher = SyncPublisher.from_settings(away)
        engine = create_engine(psycopg(database_url))
        handles = []
        for _ in range(3):
            with Session(engine, info=publisher.info) as session, session.begin():
                handles.append(enqueue(session, "tests.noop"))
        engine.dispose()
        return handles

    async with heard() as events:
        handles = await elsewhere(work)

    assert [await state(engine, handle.id) for handle in handles] == ["queued"] * 3
    assert [event.hints for event in events if isinstance(event, PublishFailed)] == [1]


async def test_its_handle_says_who_can_wait(sync_sessions: SyncSessions) -> None:
    def work() -> Handle:
        with sync_sessions.begin() as session:
            return enqueue(session, "tests.noop")

    handle = await elsewhere(work)

    with pytest.raises(TypeError, match="handle_of"):
        await handle.result()


# ── inside run_sync ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_inside_run_sync_the_loop_publishes(
    engine: AsyncEngine, sessions: Sessions, publisher: Publisher, redis: ArqRedis
) -> None:
    def legacy(session: Session) -> Handle:
        handle = JOB.enqueue(session, "a")
        session.commit()
        return handle

    async with sessions() as session:
        handle = await session.run_sync(legacy)
    await publisher.flush()

    assert set(await hints(redis)) == {str(handle.id)}


async def test_what_a_legacy_job_enqueues_counts_with_its_own_success_only(
    engine: AsyncEngine, settings: Settings, redis: ArqRedis
) -> None:
    children: list[Handle] = []

    def parent(session: Session, then: str) -> None:
        children.append(enqueue(session, "tests.noop"))
        session.commit()
        if then == "raise":
            raise ValueError

    async with a_work_with(settings, parent, max_attempts=1) as work:
        for then in ("raise", "return"):
            await run_job(work, await a_job(engine, name=NAME, args={"then": then}))
        await work.publisher.flush()

    assert [await state(engine, child.id) for child in children] == [None, "queued"]
    assert set(await hints(redis)) == {str(children[1].id)}
