from __future__ import annotations

import asyncio
import random
import socket
import time
from contextlib import AsyncExitStack

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.proxies.helpers import HUNG_UP, Connect, Raw, backends, is_zero, nothing_comes, pong, raw
from tests.proxy import Proxy, redis_proxy
from tests.support import until

# ── refuse, cut ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_refusing_proxy_hangs_up_on_all_and_nobody_gets_in_until_it_is_restored(
    proxied: tuple[Proxy, Connect], direct: asyncpg.Connection
) -> None:
    proxy, connect = proxied
    port, former = proxy.port, await connect()

    proxy.refuse()
    with pytest.raises(HUNG_UP):
        await former.fetchval("SELECT 1")
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            await connect()
    with socket.socket() as somebody_else, pytest.raises(OSError, match="in use"):
        somebody_else.bind(("127.0.0.1", port))
    await until(lambda: is_zero(backends(direct)), "PostgreSQL learns that the client is gone")
    proxy.restore()

    assert await (await connect()).fetchval("SELECT 1") == 1
    assert proxy.port == port


async def test_a_cut_resets_the_present_connections_and_new_ones_work(near_redis: Proxy) -> None:
    async with raw(near_redis) as one, raw(near_redis) as other:
        assert [await pong(one), await pong(other)] == [b"+PONG\r\n"] * 2

        near_redis.cut()

        for line in (one, other):
            with pytest.raises(ConnectionResetError):
                await line[0].readline()
    async with raw(near_redis) as line:
        assert await pong(line) == b"+PONG\r\n"
    assert (near_redis.counters.connections, near_redis.counters.cuts) == (3, 2)


async def test_a_cut_ends_the_servers_side_too(proxied: tuple[Proxy, Connect], direct: asyncpg.Connection) -> None:
    proxy, connect = proxied
    await connect()
    assert await backends(direct) == 1

    proxy.cut()

    await until(lambda: is_zero(backends(direct)), "PostgreSQL learns that the client is gone")


# ── silence, half-open ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_in_silence_nothing_passes_either_way_and_afterwards_all_of_it_does(
    near_redis: Proxy, redis: Redis, select: bytes
) -> None:
    async with raw(near_redis, select) as present:
        near_redis.silence()
        clients = len(await redis.client_list())
        async with raw(near_redis) as newcomer:
            for number, (_, writer) in enumerate((present, newcomer)):
                writer.write(select + b"SET silence:%d x\r\n" % number)
            await nothing_comes(present, newcomer)
            reached, more = await redis.exists("silence:0", "silence:1"), len(await redis.client_list()) - clients
            near_redis.restore()

            answers = [await line[0].readexactly(10) for line in (present, newcomer)]
    assert answers == [b"+OK\r\n+OK\r\n"] * 2
    assert reached == 0
    assert more <= 0
    assert await redis.exists("silence:0", "silence:1") == 2


async def test_in_silence_an_answer_on_its_way_stays_there(
    proxied: tuple[Proxy, Connect], direct: asyncpg.Connection
) -> None:
    proxy, connect = proxied
    await direct.execute("SELECT pg_advisory_lock(7)")
    asking = asyncio.create_task((await connect()).fetchval("SELECT pg_advisory_lock(7), 'answer'", column=1))
    waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    await until(lambda: direct.fetchval(waits), "PostgreSQL has the question")

    proxy.silence()
    await direct.execute("SELECT pg_advisory_unlock(7)")
    await until(lambda: is_zero(direct.fetchval(waits)), "PostgreSQL has answered")
    done, _ = await asyncio.wait([asking], timeout=0.3)
    proxy.restore()

    assert not done
    assert await asking == "answer"


async def test_in_silence_the_server_keeps_what_a_client_that_died_had_locked(
    proxied: tuple[Proxy, Connect], direct: asyncpg.Connection
) -> None:
    proxy, connect = proxied
    dying = await connect()
    await dying.execute("BEGIN; INSERT INTO note VALUES ('held')")

    proxy.silence()
    dying.terminate()
    with pytest.raises(asyncpg.LockNotAvailableError):
        await direct.execute("SET lock_timeout = 300; INSERT INTO note VALUES ('held')")
    proxy.restore()

    await until(lambda: is_zero(backends(direct)), "PostgreSQL learns that the client is gone")


async def test_half_open_connections_stay_silent_for_ever_and_new_ones_work(
    near_redis: Proxy, redis: Redis, select: bytes
) -> None:
    async with raw(near_redis, select) as former, raw(near_redis, select) as latter:
        near_redis.half_open()
        former[1].write(b"SET half:open x\r\n")
        async with raw(near_redis) as newcomer:
            assert await pong(newcomer) == b"+PONG\r\n"
            near_redis.restore()
            latter[1].write(b"SET half:open x\r\n")

            await nothing_comes(former, latter)
            assert await redis.exists("half:open") == 0
            near_redis.end_half_open()
            for line in (former, latter):
                with pytest.raises(ConnectionResetError):
                    await line[0].readline()
            assert await pong(newcomer) == b"+PONG\r\n"


# ── delay ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_delay_slows_each_way_and_keeps_the_order(near_redis: Proxy) -> None:
    async with raw(near_redis) as line:
        await pong(line)
        near_redis.delay(0.1, jitter=0.2, rng=random.Random(7))

        begun = time.monotonic()
        for number in range(20):
            line[1].write(b"ECHO %d\r\n" % number)
            await asyncio.sleep(0)  # each in a packet of its own
        answers = [await _echoed(line) for _ in range(20)]
        took = time.monotonic() - begun
        near_redis.restore()

        assert answers == list(range(20))
        assert took >= 0.2
        assert await pong(line) == b"+PONG\r\n"


async def test_when_a_delay_ends_what_comes_then_does_not_overtake(near_redis: Proxy) -> None:
    async with raw(near_redis) as line:
        await pong(line)
        near_redis.delay(0.3)
        line[1].write(b"ECHO 1\r\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(line[0].readline(), 0.1)

        near_redis.restore()
        line[1].write(b"ECHO 2\r\n")

        assert [await _echoed(line), await _echoed(line)] == [1, 2]


async def _echoed(line: Raw) -> int:
    await line[0].readline()
    return int(await line[0].readline())


async def test_the_last_words_of_a_client_that_hangs_up_arrive_also_delayed(
    near_redis: Proxy, redis: Redis, select: bytes
) -> None:
    async with raw(near_redis, select) as (_, writer):
        near_redis.delay(0.1)
        writer.write(b"SET last words\r\n")
        writer.close()
        await until(lambda: redis.exists("last"), "the words arrive")

    await until(lambda: near_redis.connected == 0, "the connection ends")


# ── what it must never change ───────────────────────────────────────────────────────────────────────────────────────


async def test_much_passes_unchanged_both_ways(near_redis: Proxy, redis: Redis, select: bytes) -> None:
    much = random.Random(5).randbytes(8_000_000)

    async with raw(near_redis, select) as (reader, writer):
        writer.write(b"*3\r\n$3\r\nSET\r\n$4\r\nmuch\r\n$%d\r\n%s\r\n" % (len(much), much))
        assert await reader.readline() == b"+OK\r\n"
        for _ in range(3):
            writer.write(b"GET much\r\n")
        answers = [(await reader.readline(), await reader.readexactly(len(much) + 2)) for _ in range(3)]

    assert await redis.get("much") == much
    assert [answer[:-2] == much for _, answer in answers] == [True] * 3


async def test_what_a_client_does_not_read_stays_with_the_server(
    near_redis: Proxy, redis: Redis, select: bytes
) -> None:
    much = 8_000_000
    await redis.set("much", b"x" * much)

    async with raw(near_redis, select) as (reader, writer):
        for _ in range(3):
            writer.write(b"GET much\r\n")
        await asyncio.sleep(0.3)  # in which all of it would pass
        waiting = [int(client["omem"]) for client in await redis.client_list()]
        for _ in range(3):
            await reader.readexactly(len(f"${much}\r\n") + much + 2)

    assert max(waiting) > much


async def test_a_server_that_is_away_is_told_by_hanging_up_and_one_at_another_place_is_reached(
    near_redis: Proxy,
) -> None:
    there, near_redis.target = near_redis.target, "/nowhere/redis.sock"
    async with raw(near_redis) as line:
        with pytest.raises(ConnectionResetError):
            await line[0].readline()

    near_redis.target = there

    async with raw(near_redis) as line:
        assert await pong(line) == b"+PONG\r\n"
    assert near_redis.counters.cuts == 0


@pytest.mark.parametrize("state", ["open", "silent", "half-open", "delayed", "refusing"])
async def test_when_its_block_ends_nothing_is_left_of_it(redis_url: str, redis: Redis, state: str) -> None:
    clients = int((await redis.info("clients"))["connected_clients"])
    async with redis_proxy(redis_url) as (proxy, _), raw(proxy) as line, raw(proxy) as other:
        await pong(line)
        if state == "silent":
            proxy.silence()
        elif state == "half-open":
            proxy.half_open()
        elif state == "delayed":
            proxy.delay(60)
        elif state == "refusing":
            proxy.refuse()
        for _, writer in (line, other):
            writer.write(b"PING\r\n")
        async with AsyncExitStack() as stack:
            if state != "refusing":
                await stack.enter_async_context(raw(proxy))  # perhaps not yet passed on
            port = proxy.port
            await proxy.close()

    assert proxy.connected == 0
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    await until(lambda: _clients_are(redis, clients), "Redis learns that the clients are gone")


async def _clients_are(redis: Redis, number: int) -> bool:
    return int((await redis.info("clients"))["connected_clients"]) <= number
