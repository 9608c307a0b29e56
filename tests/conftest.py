"""Real servers for every test, and a check that each test leaves them as it found them."""

from __future__ import annotations

import gc
import itertools
import os
import socket
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Final

import hypothesis
import pytest
from arq.connections import ArqRedis
from psycopg.errors import UndefinedTable
from sqlalchemy import Connection
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from jobs import inventory
from jobs.legacy import ledger
from tests.db import session_cases
from tests.pooler import VARIABLE as POOLER_VARIABLE
from tests.servers import MARK, TestServers, test_servers
from worker.broker.connection import connect
from worker.broker.keys import LANE_PREFIX, PAYLOAD_PREFIX
from worker.flow.publish import Publisher
from worker.settings import Settings, load_settings
from worker.testing.databases import Databases, databases

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaves_running: rows may be running when the test ends")
    config.addinivalue_line("markers", "hasty: a worker that is silent for two seconds is dead")
    config.addinivalue_line("markers", "measures: a small run of the benchmarks; CI's alone, for it takes a minute")
    config.addinivalue_line("markers", "leaves_hints: Redis may hold hints of jobs that never were")


# What takes longest, as the test processes are to begin with it; at most two of them run a stage at a time.
_FIRST: Final = (
    ("tests/chaos/test_twins.py",),
    ("tests/chaos/test_twins.py",),
    ("tests/db/machine", "tests/docs/test_readme.py", "tests/test_pytest_plugin.py", "tests/cli/test_fuzz.py"),
    ("tests/life/test_demo.py", "tests/jobs/test_export.py", "tests/flow/test_races.py", "tests/core/test_fuzz"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have each test process begin with its share of the long tests, so that none works alone at the end."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    first: list[list[pytest.Item]] = [[] for _ in range(count)]
    others: list[pytest.Item] = []
    for number, item in enumerate(items):
        places = [place for place, paths in enumerate(_FIRST) if item.nodeid.startswith(paths)]
        (first[places[number % len(places)] % count] if places else others).append(item)
    if count > 1:
        size = len(items) // count
        shares = [[*longs, *(others.pop(0) for _ in range(min(size - len(longs), len(others))))] for longs in first]
        items[:] = [*itertools.chain.from_iterable(shares), *others]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from walking all that was imported, again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def servers() -> Iterator[TestServers]:
    with test_servers() as found:
        yield found


@pytest.fixture(scope="session")
def exarq_databases(servers: TestServers) -> Iterator[Databases]:
    """The plugin's databases, on the servers of the other tests, with the tables that jobs under test write to."""
    with databases(_make_tables, servers.admin_url.render_as_string(hide_password=False)) as found:
        yield found


def _make_tables(connection: Connection) -> None:
    session_cases.Base.metadata.create_all(connection)
    inventory.Base.metadata.create_all(connection)
    ledger.Base.metadata.create_all(connection)


@pytest.fixture
async def database_url(servers: TestServers, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A migrated database of this test alone; afterwards nobody is connected and no row is running."""
    name = servers.databases.lend()
    may_run = request.node.get_closest_marker("leaves_running") is not None
    try:
        yield servers.admin_url.set(database=name).render_as_string(hide_password=False)
        await servers.databases.take_back(name, may_run=may_run)
    except BaseException:
        servers.databases.drop(name)
        raise


@pytest.fixture
async def redis(servers: TestServers) -> AsyncIterator[ArqRedis]:
    """A client of this process's own Redis database, empty but for our mark."""
    client = connect(servers.redis_url, timeout=timedelta(seconds=15))
    try:
        yield client
    finally:
        assert await client.exists(MARK), "somebody else has flushed the Redis database of the tests"
        await client.flushdb()
        await client.set(MARK, str(os.getpid()))
        await client.aclose()


@pytest.fixture
async def redis_url(servers: TestServers, redis: ArqRedis) -> str:
    """The address of the database that `redis` empties."""
    return servers.redis_url


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine at which nobody listens, and nobody will while the test lasts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        yield port


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine as a service has it."""
    engine = create_async_engine(database_url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def publisher(redis: ArqRedis) -> AsyncIterator[Publisher]:
    publisher = Publisher(redis, lease=timedelta(seconds=10))
    yield publisher
    await publisher.flush()


@pytest.fixture
async def sessions(engine: AsyncEngine, publisher: Publisher) -> async_sessionmaker[AsyncSession]:
    """The session factory of a service that enqueues."""
    return async_sessionmaker(engine, expire_on_commit=False, info=publisher.info)


@pytest.fixture
async def orderly(
    database_url: str, redis: ArqRedis, servers: TestServers, request: pytest.FixtureRequest
) -> AsyncIterator[None]:
    """Afterwards every hint in Redis is of a job that there is, and every payload stands beside a hint."""
    yield
    if request.node.get_closest_marker("leaves_hints") is None:
        await _no_orphans(servers, make_url(database_url), redis)


@pytest.fixture
def workers_database(database_url: str, servers: TestServers) -> dict[str, str]:
    """How a worker reaches the test's database: through a pooler where EXARQ_TEST_POOLER says so."""
    if servers.pooled_url is None:
        return {"url": database_url}
    url = servers.pooled_url.set(database=make_url(database_url).database)
    return {"url": url.render_as_string(hide_password=False), "pooler": os.environ[POOLER_VARIABLE]}


@pytest.fixture
def settings(
    workers_database: dict[str, str],
    redis_url: str,
    orderly: None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    """The settings of a worker on the test's servers, with short times."""
    # A loaded machine can keep a thread from beating for seconds, which only who tests that is to suffer from.
    lease = 60 if request.node.get_closest_marker("hasty") is None else 2
    for variable in [name for name in os.environ if name.startswith("EXARQ_") and "_TEST_" not in name]:
        monkeypatch.delenv(variable)
    return load_settings(
        database=workers_database,
        redis={"url": redis_url, "timeout": 2},
        jobs={"modules": (), "first_wait": 0.05, "longest_wait": 0.2},
        worker={"lease": lease, "beat": 0.2, "sweep": 0.2, "grace": 2, "concurrency": 5},
    )


async def _no_orphans(servers: TestServers, url: URL, redis: ArqRedis) -> None:
    prefix = PAYLOAD_PREFIX.encode()
    payloads = {key.removeprefix(prefix) for key in await redis.keys(prefix + b"*")}
    others = [key for key in await redis.keys("*") if not key.startswith((prefix, b"exarq:"))]
    lanes = await redis.keys(f"{LANE_PREFIX}*")
    hinted = {raw for key in others + lanes for raw in await redis.zrange(key, 0, -1)}
    if not payloads and not hinted:
        return
    with suppress(UndefinedTable):  # the test has dropped it
        known = {str(job_id).encode() for (job_id,) in servers.sql_in(url, "SELECT id FROM exarq.job")}
        # A hint of a job that waits no longer is no fault: it may be repeated or late, and the next claim drops it.
        assert hinted <= known, f"the test left hints of jobs that never were: {hinted - known}"
        assert payloads <= hinted, f"the test left payloads without a hint: {payloads - hinted}"
