"""A commit that has taken place never raises, wherever it takes place."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from tests.flow.helpers import NAME
from tests.support import heard, hints, state, until
from worker.core.states import JobState
from worker.flow import after_commit
from worker.flow.enqueue import enqueue
from worker.flow.publish import Publisher
from worker.flow.publish_now import SyncPublisher
from worker.observe.events import PublishFailed
from worker.settings import Settings


@pytest.fixture
def sync_session(database_url: str, publisher: Publisher, settings: Settings) -> Iterator[Session]:
    """A classic session with an async publisher, as where a service has both kinds."""
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    with Session(engine, info=publisher.info) as session:
        yield session
    engine.dispose()


def enqueued_on_a_loop_of_its_own(session: Session) -> UUID:
    async def endpoint() -> UUID:
        return enqueue(session, NAME).id

    return asyncio.run(endpoint())


async def test_what_an_endpoint_enqueued_and_a_thread_commits_is_published_by_the_endpoints_loop(
    sync_session: Session, engine: AsyncEngine, redis: ArqRedis
) -> None:
    job = enqueue(sync_session, NAME).id

    await asyncio.to_thread(sync_session.commit)

    await until(lambda: hints(redis), "the hint")
    assert (list(await hints(redis)), await state(engine, job)) == ([str(job)], JobState.QUEUED)


async def test_where_the_loop_is_gone_the_committing_thread_publishes_by_itself(
    sync_session: Session, redis: ArqRedis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SyncPublisher.from_settings(settings)
    monkeypatch.setattr(after_commit, "default_sync_publisher", lambda: own)
    job = await asyncio.to_thread(enqueued_on_a_loop_of_its_own, sync_session)

    await asyncio.to_thread(sync_session.commit)

    assert list(await hints(redis)) == [str(job)]
    own.close()


async def test_a_publisher_that_raises_is_told_of_and_the_commit_stands(
    sync_session: Session, engine: AsyncEngine, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_hints: object) -> None:
        raise RuntimeError("no such loop")

    monkeypatch.setattr(publisher, "publish", broken)
    job = enqueue(sync_session, NAME).id

    async with heard() as told:
        sync_session.commit()

    assert told == [PublishFailed(hints=1, error="RuntimeError: no such loop")]
    assert await state(engine, job) == JobState.QUEUED
