"""`exarq.enqueue(…)` of any client: as Python's enqueue writes it, in the client's own transaction, under a role of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
import unicodedata
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import RFC_4122, UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.support import a_job, row, state
from worker.core.codec import LIMIT
from worker.core.errors import ArgumentsInvalid, NotStorable
from worker.core.names import LONGEST_NAME, is_name
from worker.db.models import Job
from worker.db.notifications import CHANNEL
from worker.flow.call import LONGEST_KEY
from worker.flow.enqueue import call_by_name, enqueue

Sessions = async_sessionmaker[AsyncSession]
Connection = asyncpg.Connection


def plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
async def as_service(engine: AsyncEngine, database_url: str) -> AsyncIterator[str]:
    """The address under which a service connects whose role may enqueue and nothing else."""
    role = f"exarq_test_service_{uuid4().hex[:12]}"
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'p' IN ROLE exarq_enqueue"))
    yield plain(make_url(database_url).set(username=role, password="p").render_as_string(hide_password=False))
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP OWNED BY {role} CASCADE"))
        await connection.execute(text(f"DROP ROLE {role}"))


@pytest.fixture
async def service(as_service: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(as_service)
    yield connection
    await connection.close()


async def by_sql(service: Connection, name: str | None = "tests.noop", args: Any = None, **options: Any) -> UUID:
    """Call the function with these arguments; `args` is written as JSON."""
    given: dict[str, Any] = {"name": name, **({} if args is None else {"args": json.dumps(args)}), **options}
    named = ", ".join(f"{option} => ${place}" for place, option in enumerate(given, 1))
    found = await service.fetchval(f"SELECT exarq.enqueue({named})", *given.values())
    assert isinstance(found, UUID)
    return found


# ── the job ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_job_exists_if_and_only_if_the_clients_transaction_commits(
    engine: AsyncEngine, service: Connection
) -> None:
    transaction = service.transaction()
    await transaction.start()
    undone = await by_sql(service)
    await transaction.rollback()
    async with service.transaction():
        kept = await by_sql(service)
        early = await state(engine, kept)

    assert early is None
    assert await state(engine, kept) == "queued"
    assert await state(engine, undone) is None


IN_A_DAY, IN_TWO_DAYS = (datetime.now(UTC) + timedelta(days=days) for days in (1, 2))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"queue": "mail"},
    {"priority": 2},
    {"key": "a key"},
    {"key": "another", "unique": "until_started"},
    {"run_at": IN_A_DAY},
    {"run_at": IN_A_DAY, "expires": IN_TWO_DAYS},
]


async def test_the_row_is_the_one_that_an_enqueue_in_python_writes(
    engine: AsyncEngine, sessions: Sessions, service: Connection
) -> None:
    args = {"invoice_id": 7, "memo": "straße", "deep": [{"a": None}]}
    theirs = {"unique": "unique_for", "expires": "expires_at"}
    moments = {"enqueued_at", "first_due_at", "run_at"}

    for options in OPTIONS:
        async with sessions.begin() as session:
            by_python = (await enqueue(session, "tests.python", args, **options)).id
        named = {theirs.get(option, option): value for option, value in options.items()}
        written = await by_sql(service, "tests.sql", args, **named)

        ours, other = await row(engine, by_python), await row(engine, written)
        columns = [column.name for column in Job.__table__.c]
        differ = {column for column in columns if getattr(ours, column) != getattr(other, column)}
        assert {"id", "name"} <= differ <= {"id", "name"} | moments, options
        assert all(abs(getattr(ours, one) - getattr(other, one)) < timedelta(minutes=3) for one in moments), options
        assert (other.run_at == other.enqueued_at) == ("run_at" not in options)
        assert other.run_at == other.first_due_at


async def test_an_id_is_a_version_7_uuid_of_its_millisecond(service: Connection, engine: AsyncEngine) -> None:
    before = time.time_ns() // 1_000_000
    drawn = [
        found["id"] for found in await service.fetch("SELECT exarq.enqueue('x') AS id FROM generate_series(1, 500)")
    ]
    after = time.time_ns() // 1_000_000
    first = await row(engine, drawn[0])

    assert {(one.version, one.variant) for one in drawn} == {(7, RFC_4122)}
    assert len({one.int & (1 << 62) - 1 for one in drawn}) == 500
    assert [one.int >> 80 for one in drawn] == sorted(one.int >> 80 for one in drawn)
    assert before - 1 <= drawn[0].int >> 80 <= drawn[-1].int >> 80 <= after + 1
    assert drawn[0].int >> 80 == (first.enqueued_at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


async def test_null_is_as_left_out(engine: AsyncEngine, service: Connection) -> None:
    nothing = dict.fromkeys(("args", "queue", "run_at", "key", "priority", "unique_for", "expires_at"))

    found = await row(engine, await by_sql(service, **nothing))

    assert (found.args, found.queue, found.priority, found.unique_key, found.unique_for) == (
        {},
        "default",
        5,
        None,
        None,
    )


# ── who is told ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_only_a_job_that_is_new_and_due_soon_is_told_and_at_the_commit(
    service: Connection, database_url: str
) -> None:
    told: list[str] = []
    listener = await asyncpg.connect(plain(database_url))
    await listener.add_listener(CHANNEL, lambda *call: told.append(call[-1]))

    async with service.transaction():
        new = await by_sql(service, key="k")
        await by_sql(service, run_at=datetime.now(UTC) + timedelta(minutes=5))
        again = await by_sql(service, key="k")
        await listener.execute("SELECT 1")
        early = list(told)
    await service.execute(f"NOTIFY {CHANNEL}, 'the end'")
    while "the end" not in told:
        await listener.execute("SELECT 1")
    await listener.close()

    assert again == new
    assert early == []
    assert told == [str(new), "the end"]


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_is_the_same_key_in_python_and_in_sql(sessions: Sessions, service: Connection) -> None:
    first = await by_sql(service, key="k")
    async with sessions.begin() as session:
        found = await enqueue(session, "tests.noop", key="k")
        created = await enqueue(session, "tests.noop", key="other")

    assert (found.id, found.happened) == (first, "exists")
    assert await by_sql(service, key="other") == created.id
    assert await by_sql(service, "tests.another_name", key="k") != first


@pytest.mark.parametrize(
    ("unique_for", "columns", "has_it"),
    [
        ("until_done", {"state": "running"}, True),
        ("until_done", {"state": "queued", "attempt": 1}, True),
        ("until_done", {"state": "succeeded"}, False),
        ("until_started", {"state": "queued"}, True),
        ("until_started", {"state": "running"}, False),
        ("until_started", {"state": "queued", "attempt": 1}, False),
    ],
)
@pytest.mark.leaves_running
async def test_a_job_has_its_key_for_as_long_as_it_is_unique(
    unique_for: str, columns: dict[str, Any], has_it: bool, engine: AsyncEngine, service: Connection
) -> None:
    holder = await a_job(engine, unique_key="k", unique_for=unique_for, **columns)

    assert (await by_sql(service, key="k") == holder) == has_it


@pytest.mark.parametrize(
    ("columns", "left"),
    [
        ({"expires_at": datetime.now(UTC) - timedelta(hours=1)}, "cancelled"),
        ({"state": "succeeded", "unique_until": datetime.now(UTC) - timedelta(hours=1)}, "succeeded"),
    ],
    ids=["expired", "its time is over"],
)
async def test_a_job_that_is_past_its_time_gives_its_key_up(
    columns: dict[str, Any], left: str, engine: AsyncEngine, service: Connection
) -> None:
    holder = await a_job(engine, unique_key="k", unique_for="until_done", **columns)

    new = await by_sql(service, key="k")

    assert new != holder
    assert await state(engine, holder) == left
    assert await by_sql(service, key="k") == new
    found = await row(engine, holder)
    assert found.unique_until is None
    assert (found.error or "").startswith("expired: no attempt may start after") == (left == "cancelled")


async def test_a_key_is_waited_for_while_another_transaction_may_take_it(service: Connection, as_service: str) -> None:
    other = await asyncpg.connect(as_service)
    transaction = service.transaction()
    await transaction.start()
    first = await by_sql(service, key="k")

    waiting = asyncio.create_task(by_sql(other, key="k"))
    await asyncio.wait([waiting], timeout=0.2)
    waited = not waiting.done()
    await transaction.rollback()
    second = await waiting
    await other.close()

    assert waited
    assert second != first


async def test_of_many_that_want_a_key_at_once_one_creates_its_job(engine: AsyncEngine, as_service: str) -> None:
    clients = [await asyncpg.connect(as_service) for _ in range(8)]

    found = [id_ for _ in range(5) for id_ in await asyncio.gather(*(by_sql(client, key="k") for client in clients))]

    for client in clients:
        await client.close()
    assert len(set(found)) == 1
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM exarq.job"))).scalar() == 1


# ── what cannot be ──────────────────────────────────────────────────────────────────────────────────────────────────


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"name": ""}, "a name is 1 to 200 printable characters, not ''", "billing.charge"),
    ({"name": None}, "a name is 1 to 200 printable characters, not NULL", "billing.charge"),
    ({"name": "a\nb"}, "a name is 1 to 200 printable", "billing.charge"),
    ({"args": "[7]"}, "args must be a JSON object, not array", '{"invoice_id": 7}'),
    ({"args": "7"}, "args must be a JSON object, not number", "Name each argument"),
    ({"args": "null"}, "args must be a JSON object, not null", "Name each argument"),
    ({"queue": ""}, "a queue is 1 to 200", "'default'"),
    ({"queue": "arq:queue"}, "do not begin with arq: or exarq:", "'default'"),
    ({"priority": 10}, "priority must be a whole number from 0 (first) to 9, not 10", "for 5"),
    ({"priority": -1}, "priority must be", "for 5"),
    ({"key": ""}, "a key is 1 to 1000 bytes, not 0", "leave it out"),
    ({"unique_for": "ever"}, "unique_for must be 'until_done' or 'until_started', not 'ever'", "until_done"),
    ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, "expires_at must lie after the moment", "no deadline"),
    ({"run_at": datetime(1900, 1, 1, tzinfo=UTC)}, "run_at must lie within 36500 days of now", "at once"),
]


async def test_what_cannot_be_is_an_error_with_a_hint(engine: AsyncEngine, service: Connection) -> None:
    for wrong, said, hint in WRONG:
        given = {"name": "tests.noop", **wrong}
        named = ", ".join(f"{option} => ${place}" for place, option in enumerate(given, 1))

        with pytest.raises(asyncpg.InvalidParameterValueError) as refused:
            await service.fetchval(f"SELECT exarq.enqueue({named})", *given.values())

        assert said in str(refused.value)
        assert hint in str(refused.value.hint)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM exarq.job"))).scalar() == 0


async def test_no_job_is_due_or_expires_at_the_end_of_time(service: Connection) -> None:
    for option in ("run_at", "expires_at"):
        for moment in ("infinity", "-infinity"):
            with pytest.raises(asyncpg.InvalidParameterValueError):
                await service.fetchval(f"SELECT exarq.enqueue('x', {option} => '{moment}')")


def nested(levels: int, bottom: Any) -> Any:
    for _ in range(levels):
        bottom = [bottom]
    return bottom


NOTHING: list[Any] = []
LIMITS: list[dict[str, Any]] = [
    *({"name": "ü" * length} for length in (LONGEST_NAME, LONGEST_NAME + 1)),
    *({"queue": "ü" * length} for length in (LONGEST_NAME, LONGEST_NAME + 1)),
    *({"key": "ü" * (LONGEST_KEY // 2) + more} for more in ("", "x")),
    *({"args": {"a": "x" * (LIMIT - 8 + more)}} for more in (-1, 1)),
    *({"args": {"a": nested(levels, bottom)}} for levels in (198, 199, 200, 201) for bottom in (1, NOTHING)),
]


async def test_the_limits_are_pythons(service: Connection) -> None:
    found = []
    for limit in LIMITS:
        given = {"name": "tests.noop", "args": {}, **limit}
        by_python = by_postgres = True
        try:
            call_by_name(**given)
        except (ArgumentsInvalid, NotStorable):
            by_python = False
        try:
            await by_sql(service, **given)
        except asyncpg.InvalidParameterValueError:
            by_postgres = False
        found.append((by_python, by_postgres))

    assert set(found) == {(True, True), (False, False)}, found


async def test_a_name_that_people_cannot_read_is_refused_as_in_python(service: Connection) -> None:
    kinds: dict[str, list[str]] = {}
    for code in range(1, 0x10000):
        kinds.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    del kinds["Cs"], kinds["Cn"]  # no text, and not in use
    kinds["Cf"] = [one for one in kinds["Cf"] if not "\u0600" <= one <= "\u08ff"]  # signs before Arabic numbers

    wrong = []
    for character in [one for kind in kinds.values() for one in (kind[0], kind[len(kind) // 2], kind[-1])]:
        try:
            await by_sql(service, f"a{character}b")
        except asyncpg.InvalidParameterValueError:
            accepted = False
        else:
            accepted = True
        if accepted != is_name(f"a{character}b"):
            wrong.append(hex(ord(character)))

    assert wrong == []


# ── the role ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_role_reads_and_writes_nothing(engine: AsyncEngine, service: Connection) -> None:
    await by_sql(service)
    async with engine.connect() as connection:
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'exarq'"
        tables = (await connection.execute(text(query))).scalars().all()

    assert {"job", "attempt", "worker"} <= set(tables)
    for table in tables:
        for statement in (f"SELECT FROM exarq.{table}", f"DELETE FROM exarq.{table}", f"TRUNCATE exarq.{table}"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await service.execute(statement)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await service.execute("CREATE TABLE exarq.mine (a int)")


async def test_nobody_else_may_call_it(engine: AsyncEngine, database_url: str) -> None:
    role = f"exarq_test_stranger_{uuid4().hex[:12]}"
    stranger = await asyncpg.connect(plain(database_url))
    try:
        await stranger.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA exarq TO {role}; SET ROLE {role}")

        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await by_sql(stranger)
    finally:
        await stranger.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")
        await stranger.close()


async def test_what_the_caller_puts_on_its_search_path_is_not_called(engine: AsyncEngine, service: Connection) -> None:
    role = await service.fetchval("SELECT current_user")
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE SCHEMA evil AUTHORIZATION {role}"))
    for name, parameters in (("gen_random_uuid", ""), ("clock_timestamp", ""), ("octet_length", "text")):
        await service.execute(
            f"CREATE FUNCTION evil.{name}({parameters}) RETURNS integer LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'called as %', current_user; END $$"
        )
    await service.execute("CREATE TEMPORARY TABLE job (id uuid); SET search_path = evil, pg_temp, pg_catalog")

    job = await by_sql(service, key="k")

    assert await state(engine, job) == "queued"


async def test_psql_enqueues_under_the_role(engine: AsyncEngine, as_service: str) -> None:
    call = """SELECT exarq.enqueue('tests.noop', '{"word": "from psql"}', run_at => now() + interval '1 hour')"""

    if (program := shutil.which("psql")) is not None:
        done = await asyncio.to_thread(
            subprocess.run, [program, "-XAtqc", call, as_service], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        job = UUID(done.stdout.strip())
    else:
        connection = await asyncpg.connect(as_service)
        job = await connection.fetchval(call)
        await connection.close()

    assert (await row(engine, job)).args == {"word": "from psql"}
