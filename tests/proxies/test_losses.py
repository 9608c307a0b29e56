from __future__ import annotations

import asyncio
import random

import asyncpg
import pytest
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.proxies.helpers import HUNG_UP, Connect, backends, is_zero, nothing_comes, pong, raw, runs, words
from tests.proxy import Proxy, is_commit, postgres_proxy
from tests.support import until


async def test_a_lost_answer_ends_the_connection_when_the_server_has_done_what_was_asked(
    proxied: tuple[Proxy, Connect], direct: asyncpg.Connection
) -> None:
    proxy, connect = proxied
    connection, other = await connect(), await connect()
    proxy.lose_the_answer_to(lambda asked: b"INSERT" in asked)

    with pytest.raises(HUNG_UP):
        await connection.execute("INSERT INTO note VALUES ('done')")

    assert await words(direct) == ["done"]
    assert proxy.lost.is_set()
    assert (proxy.counters.answers_lost, proxy.counters.cuts) == (1, 1)
    assert await other.execute("INSERT INTO note VALUES ('the next is answered')") == "INSERT 0 1"


@pytest.mark.parametrize("delay", [0, 0.1])
async def test_a_connection_cut_at_once_ends_while_the_server_is_still_at_work(
    proxied: tuple[Proxy, Connect], direct: asyncpg.Connection, delay: float
) -> None:
    proxy, connect = proxied
    connection, locker = await connect(), await connect()
    await locker.execute("BEGIN; LOCK TABLE note")
    proxy.delay(delay)
    proxy.lose_the_answer_to(lambda asked: b"INSERT" in asked, cut="at once")

    with pytest.raises(HUNG_UP):
        await connection.execute("INSERT INTO note VALUES ('later')")
    await until(lambda: runs(direct, "INSERT"), "PostgreSQL has the question")
    await locker.execute("COMMIT")

    await until(lambda: words(direct), "PostgreSQL has done it")
    assert (proxy.counters.answers_lost, proxy.counters.cuts) == (1, 1)


async def test_a_connection_that_is_never_cut_gives_no_answer_any_more(
    proxied: tuple[Proxy, Connect], direct: asyncpg.Connection
) -> None:
    proxy, connect = proxied
    connection = await connect()
    proxy.lose_the_answer_to(lambda asked: b"INSERT" in asked, cut="never")

    asking = asyncio.create_task(connection.execute("INSERT INTO note VALUES ('done')"))
    await proxy.lost.wait()
    done, _ = await asyncio.wait([asking], timeout=0.3)

    assert not done
    assert await words(direct) == ["done"]
    assert (proxy.counters.answers_lost, proxy.counters.cuts) == (1, 0)
    asking.cancel()


async def test_a_connection_that_lost_its_answers_counts_once_however_much_is_asked_there(near_redis: Proxy) -> None:
    near_redis.lose_the_answer_to(lambda asked: b"PING" in asked, cut="never", times=2)

    for _ in range(2):
        async with raw(near_redis) as lost:
            for _ in range(3):
                lost[1].write(b"PING\r\n")
                await nothing_comes(lost)
    async with raw(near_redis) as line:
        assert await pong(line) == b"+PONG\r\n"

    assert near_redis.counters.answers_lost == 2


async def test_a_question_kept_from_the_server_was_never_asked(
    proxied: tuple[Proxy, Connect], direct: asyncpg.Connection
) -> None:
    proxy, connect = proxied
    connection = await connect()
    proxy.keep_from_the_server(lambda asked: b"INSERT" in asked)

    with pytest.raises(HUNG_UP):
        await connection.execute("INSERT INTO note VALUES ('never')")

    await until(lambda: is_zero(backends(direct)), "PostgreSQL learns that the client is gone")
    assert await words(direct) == []
    assert (proxy.counters.questions_kept, proxy.counters.cuts, proxy.lost.is_set()) == (1, 1, True)


async def test_sqlalchemys_commit_is_recognised_and_nothing_else_is(
    direct: asyncpg.Connection, database_url: str
) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        engine = create_async_engine(url)
        proxy.lose_the_answer_to(is_commit, times=None)

        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO note VALUES (:word)"), {"word": "COMMIT;"})
            await connection.execute(text("SELECT 'COMMIT;'"))
            await connection.rollback()
            async with connection.begin_nested():
                await connection.execute(text("INSERT INTO note VALUES ('committed')"))
            assert proxy.counters.answers_lost == 0
            with pytest.raises(Exception, match="connection"):
                await connection.commit()
            await connection.invalidate()
        await engine.dispose()

    assert await words(direct) == ["committed"]
    assert proxy.counters.answers_lost == 1


async def test_with_a_probability_the_seed_decides_which_commits_go_unanswered(
    proxied: tuple[Proxy, Connect], direct: asyncpg.Connection
) -> None:
    proxy, connect = proxied
    drawn = random.Random(3)
    expected = [drawn.random() < 0.3 for _ in range(40)]
    proxy.lose_the_answer_to(is_commit, times=None, probability=0.3, rng=random.Random(3))

    lost = [await _commit_is_lost(connect, f"{number:02}") for number in range(40)]

    assert lost == expected
    assert len(await words(direct)) == 40
    assert proxy.counters.answers_lost == sum(expected)


async def _commit_is_lost(connect: Connect, word: str) -> bool:
    connection = await connect()
    try:
        async with connection.transaction():
            await connection.execute("INSERT INTO note VALUES ($1)", word)
    except HUNG_UP:
        return True
    finally:
        connection.terminate()
    return False


async def test_a_question_that_comes_in_pieces_is_recognised_once(
    near_redis: Proxy, redis: Redis, select: bytes
) -> None:
    seen: list[bytes] = []

    def matches(asked: bytes) -> bool:
        seen.append(asked)
        return b"pieces" in asked

    async with raw(near_redis, select) as (reader, writer):
        near_redis.lose_the_answer_to(matches)
        for number, piece in enumerate((b"SET pie", b"ce", b"s x\r\n"), 1):
            writer.write(piece)
            await until(lambda number=number: len(seen) == number, "the proxy has the piece")  # type: ignore[misc]
        with pytest.raises(ConnectionResetError):
            await reader.readline()

    assert seen[-1] == b"SET pieces x\r\n"
    assert await redis.get("pieces") == b"x"


async def test_what_was_spared_once_is_not_found_again_with_the_bytes_that_follow(near_redis: Proxy) -> None:
    seen: list[bytes] = []

    def matches(asked: bytes) -> bool:
        seen.append(asked)
        return b"PING" in asked

    never = random.Random(1)
    near_redis.lose_the_answer_to(matches, times=None, probability=0, rng=never)
    async with raw(near_redis) as (reader, writer):
        near_redis.delay(0.2)  # the next bytes come before the answer
        writer.write(b"PING\r\n")
        await until(lambda: len(seen) == 1, "the proxy has the question")
        writer.write(b"ECHO x\r\n")

        assert await reader.readline() == b"+PONG\r\n"
    assert seen == [b"PING\r\n", b"ECHO x\r\n"]


async def test_what_was_answered_is_not_joined_with_what_is_asked_next(near_redis: Proxy) -> None:
    near_redis.lose_the_answer_to(lambda asked: asked.count(b"PING") == 2)

    async with raw(near_redis) as line:
        assert [await pong(line), await pong(line)] == [b"+PONG\r\n"] * 2


async def test_restoring_disarms_what_has_not_happened_yet(near_redis: Proxy) -> None:
    near_redis.lose_the_answer_to(lambda _: True)
    near_redis.keep_from_the_server(lambda _: True)
    near_redis.delay(60)

    near_redis.restore()

    async with raw(near_redis) as line:
        assert await pong(line) == b"+PONG\r\n"
