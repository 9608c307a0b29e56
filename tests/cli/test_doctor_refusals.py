"""`exarq doctor` where the servers answer, and refuse what a worker needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from arq.connections import ArqRedis
from redis import Redis
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import Command
from tests.cli.test_doctor import findings
from tests.servers import TestServers
from worker.cli.doctor.of_redis import _publishes
from worker.embedded import servers as embedded

pytestmark = pytest.mark.timeout(300)


async def test_a_database_that_takes_no_writes_is_an_error_for_the_doctor_and_one_line_for_an_enqueue(
    exarq: Command, database_url: str, servers: TestServers
) -> None:
    name = make_url(database_url).database
    servers.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")

    doctor, enqueue = exarq("doctor", "--json"), exarq("enqueue", "shop.charge", '{"invoice_id": 4111}')

    assert doctor.code == 1
    assert findings(doctor)["writes"][0] == "error"
    assert "default_transaction_read_only is on" in findings(doctor)["writes"][1]
    assert "PostgreSQL takes no writes" in enqueue.error
    assert "4111" not in enqueue.err


async def test_a_user_without_privileges_or_sight_of_others_is_told_so(
    exarq: Command, engine: AsyncEngine, database_url: str, servers: TestServers
) -> None:
    role = f"exarq_test_role_{os.getpid()}"
    servers.sql(f"CREATE ROLE {role} LOGIN")
    url = make_url(database_url).set(username=role).render_as_string(hide_password=False)
    try:
        closed = exarq("doctor", "--json", EXARQ_DATABASE_URL=url)
        async with engine.begin() as connection:
            await connection.execute(text(f"GRANT USAGE ON SCHEMA exarq TO {role}"))
            await connection.execute(text(f"GRANT SELECT ON ALL TABLES IN SCHEMA exarq TO {role}"))
        reads = exarq("doctor", "--json", EXARQ_DATABASE_URL=url)
        async with engine.begin() as connection:
            tables = "exarq.job, exarq.attempt, exarq.worker, exarq.upkeep, exarq.schedule"
            await connection.execute(text(f"GRANT INSERT, UPDATE, DELETE ON {tables} TO {role}"))
        writes = exarq("doctor", "--json", EXARQ_DATABASE_URL=url)
    finally:
        async with engine.begin() as connection:
            await connection.execute(text(f"DROP OWNED BY {role}"))
        servers.sql(f"DROP ROLE {role}")

    assert (closed.code, reads.code, writes.code) == (1, 1, 0)
    assert findings(closed)["privileges"][0] == "error"
    assert "may not use the schema exarq" in findings(closed)["privileges"][1]
    assert findings(reads)["privileges"][0] == "error"
    assert "lacks INSERT on exarq." in findings(reads)["privileges"][1]
    assert findings(writes)["privileges"][0] == "ok"
    assert findings(writes)["open transactions"][0] == "warning"
    assert "cannot see those of other roles" in findings(writes)["open transactions"][1]
    assert "0 taken" not in findings(writes)["connections"][1]


@pytest.fixture(scope="module")
def own_redis() -> Iterator[str]:
    """The address of a Redis of these tests alone."""
    with embedded.running(postgres=False) as found:
        yield found.redis_url


def test_a_redis_that_is_full_is_an_error_although_it_answers(exarq: Command, own_redis: str) -> None:
    admin: Any = Redis.from_url(own_redis)
    admin.config_set("maxmemory", "1")
    try:
        found = findings(exarq("doctor", "--json", EXARQ_REDIS_URL=own_redis))
    finally:
        admin.config_set("maxmemory", "0")

    assert found["scripts"][0] == "error"
    assert "raise maxmemory" in found["scripts"][1]
    admin.close()


def test_a_redis_user_without_the_keys_or_the_channels_is_told_so(exarq: Command, own_redis: str) -> None:
    admin: Any = Redis.from_url(own_redis)
    found = {}
    for rights in ("~else:* &*", "~* resetchannels"):
        user = f"u{uuid4().hex}"
        admin.execute_command("ACL", "SETUSER", user, "on", ">pw", *rights.split(), "+@all")
        url = f"unix://{user}:pw@{own_redis.removeprefix('unix://')}"
        found[rights] = findings(exarq("doctor", "--json", EXARQ_REDIS_URL=url))
        admin.execute_command("ACL", "DELUSER", user)

    assert found["~else:* &*"]["scripts"][0] == "error"
    assert "allow it" in found["~else:* &*"]["scripts"][1]
    assert found["~* resetchannels"]["scripts"][0] == "ok"
    assert found["~* resetchannels"]["messages"][0] == "warning"
    assert "&exarq:*" in found["~* resetchannels"]["messages"][1]
    admin.close()


async def test_looking_leaves_nothing_in_redis(redis: ArqRedis) -> None:
    before = await redis.keys("*")

    assert [one.level for one in await _publishes(redis)] == ["ok", "ok"]

    assert await redis.keys("*") == before
