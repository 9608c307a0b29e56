from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from tests.chaos.servers import PrivatePostgres, PrivateRedis, private_postgres, private_redis, private_servers
from tests.embedded.helpers import alive, holder, processes_in, wait_for
from tests.support import until
from worker.embedded.commands import PORT

ROOT = Path(__file__).parents[2]
OWNER = """
import asyncio, json, sys
from tests.chaos.servers import private_servers
async def own():
    async with private_servers() as servers:
        await servers.postgres.restart()
        print(json.dumps({"folder": str(servers.postgres.socket.parent),
                          "postgres_pid": servers.postgres.pid, "redis_pid": servers.redis.pid}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(own())
"""


@pytest.fixture
async def postgres() -> AsyncIterator[PrivatePostgres]:
    async with private_postgres() as server:
        yield server


@pytest.fixture
async def redis_server() -> AsyncIterator[PrivateRedis]:
    async with private_redis() as server:
        yield server


async def connect(postgres: PrivatePostgres) -> asyncpg.Connection:
    return await asyncpg.connect(host=str(postgres.socket.parent), port=PORT, user="postgres")


async def test_a_committed_row_survives_a_kill_and_an_uncommitted_one_does_not(postgres: PrivatePostgres) -> None:
    connection, other = await connect(postgres), await connect(postgres)
    await connection.execute("CREATE TABLE note (word text)")
    await connection.execute("INSERT INTO note VALUES ('committed')")
    await other.execute("BEGIN; INSERT INTO note VALUES ('uncommitted')")
    folder, former = postgres.socket.parent, postgres.pid

    await postgres.kill_immediately()
    left = [pid for pid in processes_in(folder / "data") if alive(pid)]
    took = await postgres.start()

    for dead in (connection, other):
        dead.terminate()
    again = await connect(postgres)
    assert [row["word"] for row in await again.fetch("SELECT word FROM note")] == ["committed"]
    assert "was not properly shut down" in (folder / "postgres-2.log").read_text()
    await again.close()
    assert (left, postgres.pid != former, took > 0) == ([], True, True)


async def test_a_restart_takes_the_same_socket_and_the_same_durable_settings(postgres: PrivatePostgres) -> None:
    before, at = await postgres.facts(), postgres.socket

    await postgres.restart()
    await postgres.restart()

    assert postgres.socket == at
    assert await postgres.facts() == before
    assert {name: value for name, value in before.items() if name != "server_version"} == {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
    }


async def test_a_postgres_that_may_lose_commits_is_told(postgres: PrivatePostgres) -> None:
    connection = await connect(postgres)
    await connection.execute("ALTER SYSTEM SET synchronous_commit = off")
    await connection.close()
    await postgres.restart()

    with pytest.raises(AssertionError, match="may lose what it committed"):
        await postgres.facts()


async def test_a_server_that_ended_by_itself_can_be_started_again(
    postgres: PrivatePostgres, redis_server: PrivateRedis
) -> None:
    for server, ending in ((postgres, signal.SIGQUIT), (redis_server, signal.SIGKILL)):
        os.kill(server.pid, ending)
        await until(lambda server=server: not server.is_running, "the server is gone")  # type: ignore[misc]

        await server.start()

        assert server.is_running
    connection = await connect(postgres)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_starting_blocks_nobody_else_on_the_loop(postgres: PrivatePostgres) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    await postgres.restart()
    ticking.cancel()

    assert ticks > 100


async def test_a_redis_that_was_stopped_comes_back_empty_at_the_same_place(redis_server: PrivateRedis) -> None:
    async with redis_server.client() as client:
        await client.set("key", "value")

    await redis_server.stop()
    stopped = redis_server.is_running
    await redis_server.start()

    async with redis_server.client() as client:
        assert await client.dbsize() == 0
    assert (stopped, redis_server.is_running) == (False, True)


async def test_an_old_snapshot_brings_back_what_was_deleted_since_and_nothing_that_came_later(
    redis_server: PrivateRedis,
) -> None:
    async with redis_server.client() as client:
        await client.zadd("queue", {"finished since": 1, "still there": 2})
        await client.set("payload", "old")
        snapshot = await redis_server.snapshot()
        await client.zrem("queue", "finished since")
        await client.zadd("queue", {"later": 3})
        await client.delete("payload")
        later = await redis_server.snapshot()

    for _ in range(2):
        await redis_server.stop()
        await redis_server.start(snapshot)

        async with redis_server.client() as client:
            assert await client.zrange("queue", 0, -1) == [b"finished since", b"still there"]
            assert await client.get("payload") == b"old"
            await client.flushall()
            await client.save()  # it must not write into the snapshot
    await redis_server.stop()
    await redis_server.start(later)
    async with redis_server.client() as client:
        assert await client.zrange("queue", 0, -1) == [b"still there", b"later"]
    await redis_server.stop()
    await redis_server.start()
    async with redis_server.client() as client:
        assert await client.dbsize() == 0


async def test_an_eviction_takes_that_share_of_keys_and_members_and_the_same_again_for_one_seed(
    redis_server: PrivateRedis,
) -> None:
    left = []
    for _ in range(2):
        async with redis_server.client() as client:
            await client.flushall()
            await client.zadd("queue", {f"job {n}": n for n in range(1000)})
            await client.mset({f"payload {n}": "x" for n in range(299)})

            evicted = await redis_server.evict(0.01, random.Random(4))

            left.append((sorted(await client.keys("*")), await client.zrange("queue", 0, -1)))
        assert (evicted.keys, len(evicted.hints)) == (3, 10)
        assert [len(names) for names in left[-1]] == [297, 990]
    assert left[0] == left[1]


async def test_everything_can_be_flushed(redis_server: PrivateRedis) -> None:
    async with redis_server.client() as client:
        await client.set("key", "value")

        await redis_server.flushall()

        assert await client.dbsize() == 0


async def test_when_the_block_ends_nothing_is_left_running_and_no_folder() -> None:
    async with private_servers() as servers:
        folder, pids = servers.postgres.socket.parent, [servers.postgres.pid, servers.redis.pid]
        pids += processes_in(folder)
        assert all(alive(pid) for pid in pids)

    assert not any(alive(pid) for pid in pids)
    assert processes_in(folder) == []
    assert not folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a process to its parent's end")
def test_when_the_owner_is_killed_nothing_is_left_running_and_no_folder() -> None:
    with holder(OWNER, cwd=ROOT) as owner:
        pids = [*owner.servers, *processes_in(owner.folder)]
        assert all(alive(pid) for pid in pids)

        owner.process.kill()

        wait_for(owner.nothing_is_left)
    assert not any(alive(pid) for pid in pids)
