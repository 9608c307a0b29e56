"""The passwords of both servers never leave the process: not in its output, its errors, its rows, or `exarq config`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
import redis
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from tests.cli.conftest import Command, Ended
from worker.db.migrate import upgrade
from worker.embedded import servers as embedded
from worker.embedded.servers import Servers

CORE = "s3cr3t-7f1d"
"""What nobody may ever see; around it stands what must be encoded in an address."""

PASSWORD = f"p@ss/w?rd#%&=+; ü'\"\\:{CORE}[]"
ENCODED = quote(PASSWORD, safe="")

JOBS = """
from sqlalchemy import text
from worker import Client, JobContext, job, load_settings

@job(max_attempts=1)
async def database(ctx: JobContext) -> None:
    await ctx.session.execute(text("SELECT * FROM nowhere"))

@job(max_attempts=1)
async def broker(ctx: JobContext) -> None:
    await ctx["redis"].lpush("text", "x")
    await ctx["redis"].get("text")

@job(max_attempts=1)
async def everything(ctx: JobContext) -> None:
    settings = load_settings()
    shown = [ctx, ctx["redis"], ctx["redis"].connection_pool, ctx["engine"], ctx["engine"].url, ctx["sessions"]]
    raise RuntimeError(f"{shown} {settings!r} {settings} {settings.shown()} {Client(settings)!r}")

@job
async def fine(ctx: JobContext) -> str:
    await ctx.session.execute(text("SELECT 1"))
    return "done"
"""


@dataclass(frozen=True)
class Addresses:
    """Where the servers are, as people write it: the password before the host, and among the options."""

    database: str
    database_by_option: str
    redis: str
    redis_by_option: str


@pytest.fixture(scope="module")
def guarded() -> Iterator[Addresses]:
    """A PostgreSQL and a Redis of their own that let nobody in without the password."""
    with embedded.running(fsync=False) as found:
        asyncio.run(_lock(found))
        client = redis.Redis.from_url(found.redis_url)
        client.acl_setuser(
            "u", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], channels=["*"], categories=["+@all"]
        )
        client.config_set("requirepass", PASSWORD)
        client.close()
        folder = quote(str(found.folder), safe="")
        socket = found.redis_url.partition("?")[0].removeprefix("unix://")
        yield Addresses(
            database=f"postgresql://u:{ENCODED}@/d?host={folder}&port=5432",
            database_by_option=f"postgresql:///d?user=u&password={ENCODED}&host={folder}&port=5432",
            redis=f"unix://u:{ENCODED}@{socket}",
            redis_by_option=f"unix://{socket}?db=0&username=u&password={ENCODED}",
        )


async def _lock(found: Servers) -> None:
    url = make_url(found.database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    quoted = PASSWORD.replace("'", "''")
    await connection.execute(f"SET standard_conforming_strings = on; CREATE ROLE u LOGIN PASSWORD '{quoted}'")
    await connection.execute("CREATE DATABASE d OWNER u")
    engine = create_async_engine(make_url(found.database_url).set(username="u", database="d"))
    await upgrade(engine)
    await engine.dispose()
    rules = await connection.fetchval("SHOW hba_file")
    await connection.execute(f"COPY (SELECT 'local all all scram-sha-256') TO '{rules}'")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()


@pytest.fixture
def exarq(tmp_path: Path, guarded: Addresses) -> Command:
    command = Command(
        tmp_path,
        {
            "EXARQ_DATABASE_URL": guarded.database,
            "EXARQ_REDIS_URL": guarded.redis,
            "EXARQ_JOBS_MODULES": "shop",
            "EXARQ_LOG_LEVEL": "debug",
        },
    )
    command.write("shop.py", JOBS)
    return command


def seen(done: Ended) -> str:
    """All that the command has said, in which nothing of the password is."""
    said = done.out + done.err
    assert CORE not in said
    assert PASSWORD not in said
    assert ENCODED not in said
    return said


def with_options(guarded: Addresses) -> dict[str, str]:
    return {"EXARQ_DATABASE_URL": guarded.database_by_option, "EXARQ_REDIS_URL": guarded.redis_by_option}


@pytest.mark.parametrize(("by_option", "log_format"), [(False, "text"), (True, "json")])
def test_a_worker_that_works_and_fails_tells_no_password_to_its_output_or_its_rows(
    by_option: bool, log_format: str, exarq: Command, guarded: Addresses
) -> None:
    environment = {"EXARQ_LOG_FORMAT": log_format, **(with_options(guarded) if by_option else {})}
    names = ["fine", "database", "broker", "everything"]
    ids = [exarq("enqueue", f"shop.{name}", **environment).out.strip() for name in names]

    worked = exarq("run", "--burst", **environment)

    assert worked.code == 0
    assert "Redis is away" not in seen(worked), "the password was right"
    shown = [seen(exarq("jobs", "show", *json, job_id, **environment)) for job_id in ids for json in ([], ["--json"])]
    assert ["Traceback" in told for told in shown] == [False] * 2 + [True] * 6
    assert "RuntimeError: [" in shown[-1]
    assert "***" in shown[-1], "what is shown of an address is masked"
    seen(exarq("jobs", "list", **environment))
    assert "everything" in seen(exarq("jobs", "list", "--json", **environment))


@pytest.mark.parametrize("by_option", [False, True])
def test_the_settings_are_shown_without_passwords(by_option: bool, exarq: Command, guarded: Addresses) -> None:
    environment = with_options(guarded) if by_option else {}

    for argv in (["config"], ["config", "--json"]):
        assert "***" in seen(exarq(*argv, **environment))


COMMANDS = [("run", "--burst"), ("enqueue", "shop.fine"), ("jobs", "list"), ("db", "upgrade"), ("db", "current")]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"postgresql://u:{ENCODED}@nowhere.invalid/d", "does not answer"),
        (f"postgresql://nowhere.invalid/d?user=u&password={ENCODED}", "does not answer"),
        (f"postgresql://u:{ENCODED}@127.0.0.1:1/d", "does not answer"),
        (f"postgresql://u:{ENCODED}@h/d?sslmode={CORE}", "sslmode"),
        (f"postgresql://u:{PASSWORD}@h/d", "EXARQ_DATABASE_URL"),
        (f"mysql://u:{ENCODED}@h/d", "EXARQ_DATABASE_URL"),
    ],
)
def test_no_command_tells_the_password_of_a_database_that_it_does_not_reach(
    address: str, said: str, exarq: Command
) -> None:
    for command in COMMANDS[:2]:
        done = exarq(*command, EXARQ_DATABASE_URL=address)

        assert done.code == 2
        assert said in seen(done)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_wrong_password_is_refused_without_being_told(
    command: tuple[str, ...], exarq: Command, guarded: Addresses
) -> None:
    address = guarded.database.replace("u:", "u:wrong")

    done = exarq(*command, EXARQ_DATABASE_URL=address)

    assert done.code == 2
    assert 'password authentication failed for user "u"' in seen(done)


@pytest.mark.parametrize(
    "address",
    [
        f"redis://u:{ENCODED}@nowhere.invalid",
        f"redis://u:{ENCODED}@127.0.0.1:1",
        "wrong",
        f"rediss://:{ENCODED}@127.0.0.1:1",
    ],
)
def test_a_redis_that_is_not_reached_or_refuses_costs_speed_only_and_its_password_is_not_told(
    address: str, exarq: Command, guarded: Addresses
) -> None:
    address = guarded.redis.replace("u:", "u:wrong") if address == "wrong" else address

    enqueued = exarq("enqueue", "shop.fine", EXARQ_REDIS_URL=address)
    worked = exarq("run", "--burst", EXARQ_REDIS_URL=address)

    assert (enqueued.code, worked.code) == (0, 0)
    assert "Redis does not answer" in seen(enqueued)
    assert "Redis is away" in seen(worked)
    assert '"outcome": "succeeded"' in worked.err
