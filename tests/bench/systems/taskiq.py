# /// script
# requires-python = ">=3.11"
# dependencies = ["taskiq[uv]==0.13.0", "taskiq-redis==1.2.4", "redis[hiredis]==8.1.0", "sqlalchemy[asyncio]==2.1.9", "asyncpg==0.32.0"]
# ///
"""Taskiq on a stream of Redis, with acknowledgements, its result backend, and a hand-written session per job."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from taskiq import Context, TaskiqDepends, TaskiqEvents, TaskiqState
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from tests.bench import business
from tests.bench.peer import REDIS_URL, WAITING, About, System, serve
from tests.bench.tally import arrived, began

_AT_ONCE = 100  # Taskiq has no call that enqueues many
_CONCURRENCY = "BENCH_TASKIQ_CONCURRENCY"
_RESULT_SECONDS = 1_000  # as in its README
_CONTEXT = TaskiqDepends()


async def noop(number: int) -> int:
    began()
    return number


async def wait(number: int) -> int:
    began()
    await asyncio.sleep(WAITING)
    return number


async def latency(number: int) -> int:
    arrived(number)
    return number


async def orm(number: int, context: Context = _CONTEXT) -> int:
    began()
    async with context.state.sessions.begin() as session:
        return await business.write(session, number)


async def legacy(number: int, context: Context = _CONTEXT) -> int:
    began()
    async with context.state.sessions.begin() as session:
        return int(await session.run_sync(business.post, number))


_JOBS: dict[str, Any] = {"noop": noop, "wait": wait, "latency": latency, "orm": orm, "legacy": legacy}


def broker() -> RedisStreamBroker:
    """The factory that the command `taskiq worker` calls."""
    url = os.environ[REDIS_URL]
    results: Any = RedisAsyncResultBackend(url, result_ex_time=_RESULT_SECONDS)
    made = RedisStreamBroker(url).with_result_backend(results)
    for name, job in _JOBS.items():
        made.register_task(job, name)

    @made.on_event(TaskiqEvents.WORKER_STARTUP)
    async def start(state: TaskiqState) -> None:
        state.sessions = business.sessions(int(os.environ[_CONCURRENCY]))

    return made


class Taskiq(System):
    """Taskiq."""

    about = About(
        name="taskiq",
        packages=("taskiq", "taskiq-redis", "redis", "uvloop", "sqlalchemy", "asyncpg"),
        setting="taskiq worker --workers 1 --max-async-tasks 20 (500 for wait) on uvloop, RedisStreamBroker,"
        " acknowledged when the result is saved (its default), RedisAsyncResultBackend with an expiry",
        source="https://taskiq-python.github.io/guide/cli.html, README.md of github.com/taskiq-python/taskiq-redis",
        published="none",
        keeps="result for a thousand seconds, in memory; the job's own transaction is another one",
        keeps_in="redis",
        workloads=("noop", "orm", "legacy", "wait", "latency", "enqueue"),
    )

    _broker: Any

    async def open(self) -> None:
        self._broker = broker()
        self._redis = Redis.from_url(os.environ[REDIS_URL])

    async def close(self) -> None:
        await self._broker.shutdown()
        await self._redis.aclose()

    async def install(self) -> None:
        pass

    async def reset(self) -> None:
        await self._broker.startup()  # makes the group of consumers, before which messages are not seen

    async def enqueue(self, workload: str, number: int) -> None:
        await self._broker.find_task(workload).kiq(number)

    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        for first in range(0, len(numbers), _AT_ONCE):
            await asyncio.gather(*(self.enqueue(workload, number) for number in numbers[first : first + _AT_ONCE]))

    async def left(self) -> int:
        # A message is acknowledged after its result was stored; it stays in the stream.
        (group,) = await self._redis.xinfo_groups(self._broker.queue_name)
        return int(group["lag"]) + int(group["pending"])

    def work(self, workload: str, concurrency: int) -> None:
        here = "tests.bench.systems.taskiq:broker"
        command = [sys.executable, "-m", "taskiq", "worker", here, "--workers", "1", "--log-level", "WARNING"]
        command += ["--max-async-tasks", str(concurrency)]
        os.execve(sys.executable, command, os.environ | {_CONCURRENCY: str(concurrency)})


if __name__ == "__main__":
    serve(Taskiq)
