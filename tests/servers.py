"""Which servers the tests use: the configured ones, else private ones of this process; never anybody else's data."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import redis
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from tests.databases import TestDatabases
from tests.pooler import VARIABLE as POOLER_VARIABLE
from tests.pooler import a_pooler
from worker.core.errors import EmbeddedServerError
from worker.db import migrate
from worker.embedded import servers as embedded

DATABASE_VARIABLE = "EXARQ_TEST_DATABASE_URL"
REDIS_VARIABLE = "EXARQ_TEST_REDIS_URL"
MARK = "exarq:test:ours"
_MEMORY = Path("/dev/shm")
_ROOM = 4 * 2**30


@dataclass(frozen=True)
class TestServers:
    """The servers of this test process: migrated databases to borrow, and an empty Redis database marked as ours."""

    __test__ = False

    admin_url: URL
    databases: TestDatabases
    redis_url: str
    pooled_url: URL | None  # the same server through a pooler, where the tests are to use one
    admin: psycopg.Connection[Any]  # kept, and on no loop: to connect costs more than what a test asks

    def sql(self, statement: str, **values: object) -> list[Any]:
        """Run one statement outside any test's database; returns its rows."""
        return _rows(self.admin, statement, values)

    def sql_in(self, url: URL, statement: str) -> list[Any]:
        """Run one statement in a test's database; returns its rows."""
        with psycopg.connect(_dsn(url), autocommit=True) as connection:
            return _rows(connection, statement, {})


@contextmanager
def test_servers() -> Iterator[TestServers]:
    with ExitStack() as stack:
        database_url = os.environ.get(DATABASE_VARIABLE)
        redis_url = os.environ.get(REDIS_VARIABLE)
        if database_url is None or redis_url is None:
            own = stack.enter_context(_start(postgres=database_url is None, redis=redis_url is None))
            database_url = database_url or own.urls.database_url
            redis_url = redis_url or own.urls.redis_url
        admin = make_url(database_url).set(drivername="postgresql+asyncpg")
        template = f"exarq_test_template_{uuid4().hex[:12]}"
        # Copied as files it is there in half the time; on a server that is not ours that would cost a checkpoint each.
        copying = "STRATEGY FILE_COPY" if database_url != os.environ.get(DATABASE_VARIABLE) else ""
        pooled = stack.enter_context(a_pooler(admin)) if os.environ.get(POOLER_VARIABLE) else None
        own_redis = stack.enter_context(_own_redis_database(redis_url))
        connection = stack.enter_context(psycopg.connect(_dsn(admin), autocommit=True))
        lent = TestDatabases(admin, connection, template, copying)
        found = TestServers(admin, lent, own_redis, pooled, connection)
        found.sql(f"CREATE DATABASE {template}")
        stack.callback(found.sql, f"DROP DATABASE IF EXISTS {template} WITH (FORCE)")
        asyncio.run(_migrate(admin.set(database=template)))
        stack.callback(lent.close)
        yield found


def _start(*, postgres: bool, redis: bool) -> embedded.RunningServers:
    """The wheels' servers, so that the versions under test are the same on every machine; else those on PATH."""
    with tempfile.TemporaryDirectory() as nothing, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", nothing)
        if _has_room(_MEMORY):
            patch.setattr(tempfile, "tempdir", str(_MEMORY))
        try:
            return embedded.start(fsync=False, postgres=postgres, redis=redis)
        except EmbeddedServerError:
            patch.undo()
            return embedded.start(fsync=False, postgres=postgres, redis=redis)


def _has_room(folder: Path) -> bool:
    """Whether servers can live there: a thousand databases are made and dropped, which a disk takes long for."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize >= _ROOM and not found.f_flag & os.ST_NOEXEC


async def _migrate(url: URL) -> None:
    engine = create_async_engine(url)
    await migrate.upgrade(engine)
    await engine.dispose()


@contextmanager
def _own_redis_database(url: str) -> Iterator[str]:
    """An empty database of this Redis that we have marked, so that only our own is ever flushed."""
    if url.startswith("unix"):
        base, numbers = url.partition("?")[0] + "?db={}", range(1, 16)
    else:
        base, numbers = url.rpartition("/")[0] + "/{}" if url.count("/") > 2 else url + "/{}", range(1, 16)
    for number in numbers:
        client = redis.Redis.from_url(base.format(number))
        with client:
            if client.dbsize() == 0 and client.set(MARK, str(os.getpid()), nx=True):
                if client.dbsize() != 1:
                    client.delete(MARK)
                    continue
                try:
                    yield base.format(number)
                finally:
                    client.flushdb()
                return
    raise RuntimeError(f"no empty database left in the Redis at {REDIS_VARIABLE}; empty one of 1 to 15")


def _rows(connection: psycopg.Connection[Any], statement: str, values: dict[str, object]) -> list[Any]:
    cursor = connection.execute(statement, values or None)
    return cursor.fetchall() if cursor.description else []


def _dsn(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)
