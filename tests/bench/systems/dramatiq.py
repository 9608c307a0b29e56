# /// script
# requires-python = ">=3.11"
# dependencies = ["dramatiq[redis]==2.2.1", "redis[hiredis]==8.1.0", "psycopg[binary]==3.3.9", "sqlalchemy[asyncio]==2.1.9", "asyncpg==0.32.0"]
# ///
"""Dramatiq on Redis: threads, and its event loop for what awaits, with a hand-written session per job."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from functools import cache

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware.asyncio import AsyncIO
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from tests.bench import business
from tests.bench.peer import DATABASE_URL, REDIS_URL, WAITING, About, System, serve
from tests.bench.tally import arrived, began

_CONCURRENCY = "BENCH_DRAMATIQ_CONCURRENCY"


def noop(number: int) -> int:
    began()
    return number


async def wait(number: int) -> int:
    began()
    await asyncio.sleep(WAITING)
    return number


def latency(number: int) -> int:
    arrived(number)
    return number


async def orm(number: int) -> int:
    began()
    async with _sessions().begin() as session:
        return await business.write(session, number)


def legacy(number: int) -> int:
    began()
    with _sync_sessions().begin() as session:
        return business.post(session, number)


@cache
def _sessions() -> async_sessionmaker[AsyncSession]:
    return business.sessions(int(os.environ[_CONCURRENCY]))


@cache
def _sync_sessions() -> sessionmaker[Session]:
    url = os.environ[DATABASE_URL].replace("postgresql://", "postgresql+psycopg://", 1)
    engine = create_engine(url, pool_size=int(os.environ[_CONCURRENCY]), max_overflow=0)
    return sessionmaker(engine, expire_on_commit=False)


def broker() -> RedisBroker:
    """What the command `dramatiq` calls to set the broker up."""
    made = RedisBroker(url=os.environ[REDIS_URL])
    made.add_middleware(AsyncIO())
    dramatiq.set_broker(made)
    for job in (noop, wait, latency, orm, legacy):
        dramatiq.actor(job, broker=made)
    return made


class Dramatiq(System):
    """Dramatiq."""

    about = About(
        name="dramatiq",
        packages=("dramatiq", "redis", "psycopg", "sqlalchemy", "asyncpg"),
        setting="dramatiq --processes 1 --threads 8, its default (500 for wait), RedisBroker with its default middleware, and"
        " AsyncIO for orm and wait; legacy in a thread with a sync Session on psycopg; no results, its default",
        source="https://dramatiq.io/guide.html, https://dramatiq.io/cookbook.html#asyncio",
        published="none",
        keeps="nothing",
        keeps_in="redis",
        workloads=("noop", "orm", "legacy", "wait", "latency", "enqueue"),
        concurrency={"noop": 8, "orm": 8, "legacy": 8, "latency": 8},
    )

    _broker: RedisBroker

    async def open(self) -> None:
        self._broker = broker()

    async def close(self) -> None:
        self._broker.close()

    async def install(self) -> None:
        pass

    async def reset(self) -> None:
        pass

    async def enqueue(self, workload: str, number: int) -> None:
        self._broker.get_actor(workload).send(number)

    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        for number in numbers:
            await self.enqueue(workload, number)

    async def left(self) -> int:
        # A message stays in this hash until it is acknowledged.
        return int(self._broker.client.hlen(f"{self._broker.namespace}:default.msgs"))

    def work(self, workload: str, concurrency: int) -> None:
        command = [sys.executable, "-m", "dramatiq", "tests.bench.systems.dramatiq:broker"]
        command += ["--processes", "1", "--threads", str(concurrency), "--skip-logging"]
        os.execve(sys.executable, command, os.environ | {_CONCURRENCY: str(concurrency)})


if __name__ == "__main__":
    serve(Dramatiq)
