"""Producers race for keys while workers take and finish the jobs: one holder of a key, and no wish is lost.

`EXARQ_TEST_RACES=100000 pytest -s tests/flow/test_races.py` runs as many as you like and says how long it took.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final
from uuid import uuid4

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from worker.core.errors import AlreadyEnqueued
from worker.db import transitions
from worker.db.ids import uuid7
from worker.flow.call import Call
from worker.flow.enqueue import call_by_name, enqueue_many
from worker.flow.publish import Publisher

RACES: Final = int(os.environ.get("EXARQ_TEST_RACES", "1000"))
KEYS: Final = 12
KEYS_OF_A_RACE: Final = 3
PAIRS: Final = 4
NAME: Final = "tests.race"

# What a transaction enqueued, written in that transaction; a worker serves what it sees when it runs the job. A job that
# was skipped may run before the commit of who has found it.
_TABLE: Final = """
CREATE TABLE wish (job_id uuid, happened text, waits boolean, served boolean DEFAULT false);
CREATE INDEX ON wish (job_id);
"""
_WISH: Final = text("""
    INSERT INTO wish SELECT job.id, :happened, attempt = 0 FROM exarq.job WHERE id = :id
""")
_SERVE: Final = text("UPDATE wish SET served = true WHERE job_id = ANY(:ids)")
_HOLDERS: Final = """
    SELECT unique_key, count(*) FROM exarq.job
    WHERE state = 'queued' AND attempt = 0 OR unique_for = 'until_done' AND state IN ('queued', 'running')
    GROUP BY name, unique_key HAVING count(*) > 1
"""
_LOST: Final = """
    SELECT job_id, 'has no job' FROM wish WHERE NOT EXISTS (SELECT FROM exarq.job WHERE id = job_id)
    UNION ALL SELECT job_id, happened || ', and its job ran before its commit' FROM wish
    WHERE waits AND NOT served AND happened <> 'exists'
    UNION ALL SELECT id, 'a job that nobody has enqueued' FROM exarq.job
    WHERE NOT EXISTS (SELECT FROM wish WHERE job_id = id AND happened = 'created')
    UNION ALL SELECT id, 'has not ended' FROM exarq.job WHERE state <> 'succeeded'
"""


class Races:
    """Pairs of producers, two workers, and somebody who looks."""

    def __init__(self, engine: AsyncEngine, sessions: async_sessionmaker[AsyncSession], seed: int) -> None:
        self.engine = engine
        self.sessions = sessions
        self.rng = random.Random(seed)
        self.left = RACES // KEYS_OF_A_RACE
        self.happened: Counter[str] = Counter()
        self.produced = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as others:
            others.create_task(self.look())
            for _ in range(2):
                others.create_task(self.work())
            async with asyncio.TaskGroup() as producers:
                for _ in range(PAIRS):
                    producers.create_task(self.produce())
            self.produced.set()

    async def produce(self) -> None:
        while self.left > 0:
            self.left -= 1
            keys = self.rng.sample(range(KEYS), KEYS_OF_A_RACE)
            await asyncio.gather(*(self.transaction(self.rng.sample(keys, len(keys))) for _ in range(2)))

    async def transaction(self, keys: list[int]) -> None:
        """One producer's part: half of these are rolled back, in whole or to a savepoint."""
        how, calls = self.rng.random(), [self.call(key) for key in keys]
        async with self.sessions() as session:
            savepoint = await session.begin_nested() if how < 0.2 else None
            try:
                handles = await enqueue_many(session, calls)
            except AlreadyEnqueued:
                self.happened["raised"] += 1
                handles = []
            if savepoint is not None:
                await savepoint.rollback()
                handles = []
            for handle in handles:
                await session.execute(_WISH, {"id": handle.id, "happened": handle.happened})
            if how > 0.7:
                await session.rollback()
                self.happened["rolled back"] += 1
                return
            await session.commit()
            self.happened.update(handle.happened for handle in handles)

    def call(self, key: int) -> Call:
        match self.rng.random():
            case dice if dice < 0.2:
                return call_by_name(NAME, {}, key=str(key), on_conflict="replace")
            case dice if dice < 0.25:
                return call_by_name(NAME, {}, key=str(key), on_conflict="raise")
            case _:
                return call_by_name(NAME, {}, key=str(key), unique=self.rng.choice(["until_started", "until_done"]))

    async def work(self) -> None:
        """Claim, serve and finish, or give back; to the end."""
        async with self.engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
            while True:
                ended = self.produced.is_set()
                claimed = await self.claim(connection)
                if ended and not claimed:
                    return
                await connection.execute(_SERVE, {"ids": [job.held.job_id for job in claimed]})
                again = [job.held for job in claimed if self.rng.random() < 0.2]
                rest = {job.held: "1" for job in claimed if job.held not in again}
                while again or rest:  # who is about to find that it runs may hold its row for a moment
                    released = {moved.job_id for moved in await transitions.release_many(connection, again, "again")}
                    again = [held for held in again if held.job_id not in released]
                    for held in await transitions.succeed_many(connection, rest):
                        del rest[held]

    async def claim(self, connection: AsyncConnection) -> list[transitions.ClaimedJob]:
        return await transitions.claim_by_scan(
            connection, ["default"], room=4, token=uuid4(), worker_id=uuid7(), may_take_suspect=True
        )

    async def look(self) -> None:
        async with self.engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
            while not self.produced.is_set():
                assert (await connection.execute(text(_HOLDERS))).all() == []
                self.happened["looks"] += 1
                await asyncio.sleep(0.02)


@pytest.mark.timeout(3600)
@pytest.mark.leaves_hints
async def test_producers_race_for_keys_and_one_job_has_each(engine: AsyncEngine, races: Races) -> None:
    begun = time.monotonic()
    await races.run()

    async with engine.begin() as connection:
        offences = (await connection.execute(text(_LOST))).all()
        await connection.execute(text("REINDEX INDEX exarq.job_unique"))
    print(f"{RACES:,} races in {time.monotonic() - begun:.0f} s: {dict(races.happened)}")
    assert offences == []
    assert {"created", "exists", "replaced", "raised", "rolled back", "looks"} <= set(races.happened)


@pytest.fixture
async def races(database_url: str, engine: AsyncEngine, redis: ArqRedis) -> AsyncIterator[Races]:
    async with engine.begin() as connection:
        for statement in _TABLE.strip().split("\n"):
            await connection.execute(text(statement))
    async with _a_wide_engine(database_url) as wide:
        publisher = Publisher(redis, lease=timedelta(seconds=10))
        yield Races(wide, async_sessionmaker(wide, info=publisher.info), seed=7)
        await publisher.flush()


@asynccontextmanager
async def _a_wide_engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database_url, pool_size=2 * PAIRS + 3)
    yield engine
    await engine.dispose()
