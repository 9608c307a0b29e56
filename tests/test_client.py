"""The client of a program without an engine of its own."""

from __future__ import annotations

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.broker.listeners import listening
from tests.support import a_job, row, state, until
from worker.broker.messages import CancelAsked, Cancelled
from worker.client import Client
from worker.core.errors import ResultTimeout, UnknownJob
from worker.db import reads
from worker.db.ids import uuid7
from worker.flow.enqueue import enqueue
from worker.settings import Settings


@pytest.mark.leaves_running
async def test_a_client_cancels_in_a_transaction_of_its_own_and_its_worker_is_told(
    engine: AsyncEngine, redis: ArqRedis, settings: Settings
) -> None:
    worker = uuid7()
    waits, runs = await a_job(engine), await a_job(engine, state="running", worker_id=worker)
    async with engine.connect() as connection:
        installation = await reads.installation_id(connection)

    async with listening(redis, installation) as told:
        async with Client(settings) as client:
            answers = [await client.cancel(job) for job in (waits, runs, uuid7())]
            flagged = (await row(engine, runs)).cancel_requested
        await until(lambda: len(told) == 2, "the workers are told")

    assert [answer.outcome for answer in answers] == ["cancelled", "requested", "unknown"]
    assert await state(engine, waits) == "cancelled"
    assert flagged
    assert told == [Cancelled(waits, installation), CancelAsked(runs, worker, installation)]


@pytest.mark.parametrize("name", ["engine", "sessions", "publisher"])
def test_a_client_that_is_not_open_says_how_to_open_it(settings: Settings, name: str) -> None:
    client = Client(settings)

    with pytest.raises(RuntimeError, match=rf"^this client is not open, so it has no {name}: `async with Client\(\)"):
        getattr(client, name)

    assert not hasattr(client, "session")


async def test_a_client_enqueues_by_name_in_a_transaction_of_its_own(engine: AsyncEngine, settings: Settings) -> None:
    async with Client(settings) as client:
        created = await client.enqueue("tests.by_client", {"word": "a"}, key="k", priority=2)
        found = await client.enqueue("tests.by_client", {"word": "b"}, key="k")
        with pytest.raises(UnknownJob):
            await client.enqueue("tests.unheard_of", strict=True)
        with pytest.raises(ResultTimeout, match="it is queued"):
            await created.result(timeout=0)

    assert (created.happened, found.happened, found.id) == ("created", "exists", created.id)
    stored = await row(engine, created.id)
    assert (stored.args, stored.priority) == ({"word": "a"}, 2)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM exarq.job"))).scalar() == 1


@pytest.mark.parametrize("hidden", [True, False])
async def test_what_a_client_sent_stands_in_its_errors_only_where_the_settings_say_so(
    hidden: bool, engine: AsyncEngine, settings: Settings
) -> None:
    database = settings.database.model_copy(update={"hide_parameters": hidden})

    async with Client(settings.model_copy(update={"database": database})) as client, client.sessions() as session:
        await session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(DBAPIError) as refused:
            await enqueue(session, "tests.by_client", {"word": "a secret"})

    assert ("a secret" in str(refused.value)) is not hidden
