"""`exarq doctor`: what is well, what hurts and what is broken, each with what to do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import Command, Ended
from tests.pooler import a_pooler, needs_pgbouncer
from tests.servers import TestServers
from tests.support import a_job
from worker.cli.doctor.of_postgres import _transactions, clock
from worker.cli.doctor.of_redis import _memory, _version
from worker.embedded import servers as embedded

pytestmark = pytest.mark.timeout(300)


def findings(done: Ended) -> dict[str, tuple[str, str]]:
    return {one["what"]: (one["level"], f"{one['found']}; {one['advice']}") for one in done.json}


async def test_what_an_installation_stands_on_is_looked_at(exarq: Command, engine: AsyncEngine) -> None:
    await a_job(engine, name="shop.charge", queue="night")
    await a_job(engine, name="shop.gone")

    people, program = exarq.cold("doctor"), exarq("doctor", "--json")

    found = findings(program)
    assert (people.code, program.code, people.err) == (0, 0, "")
    well = ("jobs.modules", "version", "connection", "tables", "connections", "autovacuum", "scripts", "eviction")
    assert {what: found[what][0] for what in well} == dict.fromkeys(well, "ok")
    assert found["workers"] == ("warning", "none is there; start one with `exarq run`")
    assert found["queues"][0] == "warning"
    assert "default (1), night (1)" in found["queues"][1]
    assert "`exarq run --queue …`" in found["queues"][1]
    assert found["names"][0] == "warning"
    assert "shop.gone (1)" in found["names"][1]
    assert "shop.charge" not in found["names"][1]
    assert {one["level"] for one in program.json} <= {"ok", "warning"}
    assert people.out.splitlines()[1].split()[0] == "ok"


async def test_what_is_broken_is_an_error_with_advice_and_the_rest_is_looked_at_all_the_same(
    exarq: Command, engine: AsyncEngine, closed_port: int
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.alembic_version SET version_num = '0000'"))
    exarq.write("shop.py", "import nowhere_to_be_found")

    here = exarq("doctor", "--json", EXARQ_REDIS_URL=f"redis://127.0.0.1:{closed_port}")
    away = exarq("doctor", "--json", EXARQ_DATABASE_URL=f"postgresql://u:hunter2@127.0.0.1:{closed_port}/d")

    found, other = findings(here), findings(away)
    assert (here.code, away.code, here.err, away.err) == (1, 1, "", "")
    assert found["jobs.modules"][0] == "error"
    assert "nowhere_to_be_found" in found["jobs.modules"][1]
    assert found["tables"][0] == "error"
    assert "run `exarq db upgrade`" in found["tables"][1]
    assert found["Redis"][0] == "error"
    assert "does not answer" in found["Redis"][1]
    assert other["PostgreSQL"][0] == "error"
    assert "start it, or correct EXARQ_DATABASE_URL" in other["PostgreSQL"][1]
    assert other["Redis"][0] == "ok"
    assert "hunter2" not in away.out


@needs_pgbouncer
def test_a_pooler_in_between_is_known_and_has_to_be_told(
    exarq: Command, servers: TestServers, database_url: str
) -> None:
    with a_pooler(servers.admin_url) as pooled:
        url = pooled.set(database=make_url(database_url).database).render_as_string(hide_password=False)
        untold = exarq("doctor", "--json", EXARQ_DATABASE_URL=url)
        told = exarq("doctor", "--json", EXARQ_DATABASE_URL=url, EXARQ_DATABASE_POOLER="pgbouncer")
    direct = exarq("doctor", "--json", EXARQ_DATABASE_POOLER="pgbouncer")

    assert untold.code == 1
    assert findings(untold)["connection"][0] == "error"
    assert "unsupported startup parameter" in findings(untold)["connection"][1]
    assert 'set database.pooler = "pgbouncer"' in findings(untold)["connection"][1]
    assert findings(told)["connection"] == ("ok", "through a pooler, as database.pooler says; ")
    assert findings(told)["tables"][0] == "ok"
    assert findings(direct)["connection"][0] == "warning"
    assert "leave it out" in findings(direct)["connection"][1]


@needs_pgbouncer
def test_a_pooler_without_a_backend_for_each_slot_is_told(
    exarq: Command, servers: TestServers, database_url: str
) -> None:
    found = {}
    for backends in (16, 15):
        with a_pooler(servers.admin_url, backends=backends) as pooled:
            url = pooled.set(database=make_url(database_url).database).render_as_string(hide_password=False)
            asked = {"EXARQ_DATABASE_URL": url, "EXARQ_DATABASE_POOLER": "pgbouncer", "EXARQ_WORKER_CONCURRENCY": "5"}
            found[backends] = findings(exarq("doctor", "--json", **asked))["connections"]

    may = "a worker with concurrency 5 may use 16 backends at once"
    assert found[16] == ("ok", f"{may}, the pooler has them; ")
    assert found[15][0] == "warning"
    assert found[15][1].startswith(f"{may}, the pooler had 15 left; raise pgbouncer's default_pool_size")


@pytest.mark.parametrize(
    ("info", "level"),
    [
        ({"maxmemory": 10, "maxmemory_policy": "allkeys-lru"}, "warning"),
        ({"maxmemory": 10, "maxmemory_policy": "noeviction"}, "ok"),
        ({"maxmemory": 0, "maxmemory_policy": "allkeys-lru"}, "ok"),
    ],
)
def test_a_redis_that_may_throw_hints_away_is_warned_of(info: dict[str, Any], level: str) -> None:
    assert [one.level for one in _memory(info)] == [level]


def test_an_eviction_policy_is_read_from_the_server(exarq: Command) -> None:
    with embedded.start(postgres=False) as own, Redis.from_url(own.urls.redis_url) as redis:
        redis.config_set("maxmemory", "1gb")
        redis.config_set("maxmemory-policy", "allkeys-lru")
        found = findings(exarq("doctor", "--json", EXARQ_REDIS_URL=own.urls.redis_url))

    assert found["eviction"][0] == "warning"
    assert "set noeviction" in found["eviction"][1]


def test_a_redis_that_is_too_old_is_an_error() -> None:
    assert _version({"redis_version": "6.0.16"}).level == "error"
    assert _version({"redis_version": "6.2.0"}).level == "ok"
    assert _version({"redis_version": "7.2.4", "valkey_version": "9.1.2"}).found == "Valkey 9.1.2"


def test_clocks_that_are_apart_are_warned_of() -> None:
    now = datetime.now(UTC)

    assert clock("c", now, now + timedelta(seconds=1)).level == "ok"
    assert "20 s behind" in clock("c", now, now - timedelta(seconds=20)).found


def test_a_long_open_transaction_is_named() -> None:
    oldest = {"pid": 7, "who": "report", "state": "idle in transaction", "age": timedelta(hours=2)}

    assert "report (pid 7, idle in transaction) has one open for 2 h" in _transactions(oldest).found
