"""The user's own session factory: what of it an attempt keeps, and what cannot work and is refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from tests.db.attempts import kept_by_plain_sqlalchemy, run, words
from tests.db.moves import a_held_job
from tests.db.session_cases import CASES, Note, add
from tests.flow.helpers import end_backend
from tests.pooler import a_pooler, needs_pgbouncer
from tests.servers import TestServers
from tests.support import a_work, heard, until
from worker.core.errors import LeaseLost, SettingsError
from worker.db.transitions import Held
from worker.db.user_sessions import UserSessions
from worker.flow.work import Work
from worker.observe.events import PoolTooSmall
from worker.settings import Settings

pytestmark = pytest.mark.leaves_running

Sessions = async_sessionmaker[AsyncSession]
Make = Callable[[str], Any]
_make: list[Make] = []


def make_sessions(url: str) -> Any:
    """What `database.sessions` names in these tests; each says what it makes."""
    return _make[-1](url)


@pytest.fixture(autouse=True)
def _made_by_none() -> Iterator[None]:
    yield
    _make.clear()


def of(settings: Settings, make: Make) -> Settings:
    _make.append(make)
    named = settings.database.model_copy(update={"sessions": f"{__name__}:make_sessions"})
    return settings.model_copy(update={"database": named})


# ── what stays the user's ───────────────────────────────────────────────────────────────────────────────────────────


class TenantSession(Session):
    """A sync session class with an event of its own."""


class Tenants(AsyncSession):
    """An async session class with a method of its own."""

    sync_session_class = TenantSession

    async def tenant(self) -> str:
        return str((await self.execute(text("SELECT current_setting('app.tenant', true)"))).scalar_one())


@event.listens_for(TenantSession, "after_begin")
def _of_the_tenant(session: Session, _transaction: Any, connection: Any) -> None:
    connection.execute(text("SELECT set_config('app.tenant', :name, true)"), {"name": session.info["tenant"]})


def tenants(url: str) -> Any:
    return async_sessionmaker(create_async_engine(url), class_=Tenants, info={"tenant": "acme"}, autoflush=False)


@pytest.mark.usefixtures("note_table")
async def test_a_job_gets_the_users_classes_with_their_methods_events_and_options(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work(of(settings, tenants)) as work:
        held = await a_held_job(engine)

        async def body(session: AsyncSession) -> None:
            assert isinstance(session, Tenants)
            assert isinstance(session.sync_session, TenantSession)
            assert await session.tenant() == "acme"
            assert not session.sync_session.autoflush
            assert session.sync_session.expire_on_commit  # SQLAlchemy's default, and the user's choice
            add(session, "kept")
            await session.commit()
            assert await session.tenant() == "acme"

        assert await run(work, held, body)

        assert await words(engine) == {"kept"}
        assert work.jobs_engine is work.sessions.kw["bind"]


@pytest.mark.usefixtures("note_table")
async def test_an_attempt_keeps_what_plain_sqlalchemy_keeps_and_without_its_token_nothing(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work(of(settings, tenants)) as work:
        work.sessions.configure(autoflush=True, expire_on_commit=False)  # as the cases want it
        for body in CASES:
            expected = await kept_by_plain_sqlalchemy(engine, body)
            held = await a_held_job(engine)
            if expected:
                with pytest.raises(LeaseLost):
                    await run(work, Held(held.job_id, uuid4()), body)
            assert await words(engine) == set(), body.__name__

            await run(work, held, body)

            assert await words(engine) == expected, body.__name__
            async with engine.begin() as connection:
                await connection.execute(text("TRUNCATE note"))


class Keeping(Session):
    """A sync session class that deletes nothing, and counts what it is asked for."""

    def delete(self, instance: object) -> None:
        self._ask("delete")

    def get(self, *args: Any, **kwargs: Any) -> Any:
        self._ask("get")
        return super().get(*args, **kwargs)

    def refresh(self, *args: Any, **kwargs: Any) -> None:
        self._ask("refresh")
        super().refresh(*args, **kwargs)

    def commit(self) -> None:
        self._ask("commit")
        super().commit()

    def rollback(self) -> None:
        self._ask("rollback")
        super().rollback()

    def _ask(self, name: str) -> None:
        self.info["asked"].append(name)


@pytest.mark.usefixtures("note_table")
async def test_what_the_users_class_overrides_it_overrides_in_an_attempt(
    engine: AsyncEngine, settings: Settings
) -> None:
    asked: list[str] = []

    def make(url: str) -> Any:
        info = {"asked": asked}
        return async_sessionmaker(
            create_async_engine(url), sync_session_class=Keeping, info=info, expire_on_commit=False
        )

    async with a_work(of(settings, make)) as work:

        async def body(session: AsyncSession) -> None:
            kept = Note(word="kept")
            session.add(kept)
            await session.commit()
            await session.get(Note, "kept")
            await session.refresh(kept)
            await session.delete(kept)
            await session.rollback()
            assert asked == ["commit", "get", "refresh", "delete", "rollback"]
            await session.delete(kept)

        assert await run(work, await a_held_job(engine), body)

        assert await words(engine) == {"kept"}


@pytest.mark.usefixtures("note_table")
async def test_a_factory_that_begins_nothing_by_itself_does_in_an_attempt(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work(of(settings, lambda url: async_sessionmaker(create_async_engine(url), autobegin=False))) as work:

        async def body(session: AsyncSession) -> None:
            async with session.begin():
                add(session, "kept")

        assert await run(work, await a_held_job(engine), body)

        assert await words(engine) == {"kept"}


# ── what is ours on its connections ─────────────────────────────────────────────────────────────────────────────────


async def said(work: Work, engine: AsyncEngine, *settings: str) -> list[Any]:
    """What an attempt's connection says of these settings, first its backend's pid."""
    found: list[Any] = []

    async def body(session: AsyncSession) -> None:
        found.append((await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())
        for name in settings:
            found.append((await session.execute(text("SELECT current_setting(:name)"), {"name": name})).scalar_one())  # noqa: PERF401 — awaits
        await session.execute(text("SET search_path = nowhere"))

    await run(work, await a_held_job(engine), body)
    return found


def with_settings_of_its_own(url: str) -> Any:
    engine = create_async_engine(url, pool_size=5, connect_args={"server_settings": {"work_mem": "7MB"}})

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        before, connection.autocommit = connection.autocommit, True
        cursor = connection.cursor()
        cursor.execute("SET search_path = 'it''s', public")
        cursor.close()
        connection.autocommit = before

    return async_sessionmaker(engine)


async def test_what_the_engine_sets_on_a_connection_is_the_same_for_every_job(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work(of(settings, with_settings_of_its_own)) as work:
        first, second = [await said(work, engine, "search_path", "work_mem") for _ in range(2)]

        assert first == second
        assert first[1:] == ['"it\'s", public', "7MB"]


def of_another_role(url: str) -> Any:
    engine = create_async_engine(url, pool_size=5)

    @event.listens_for(engine.sync_engine, "connect")
    def become(connection: Any, _record: Any) -> None:
        connection.run_async(lambda driver: driver.execute("SET ROLE pg_monitor"))

    return async_sessionmaker(engine)


async def test_a_role_that_the_engine_took_is_taken_again_for_the_next_job(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("GRANT USAGE ON SCHEMA exarq TO pg_monitor"))
        await connection.execute(text("GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA exarq TO pg_monitor"))
    async with a_work(of(settings, of_another_role)) as work:
        first, second = [await said(work, engine, "role") for _ in range(2)]

    assert first == second
    assert first[1] == "pg_monitor"


def by_a_creator(url: str) -> Any:
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return async_sessionmaker(create_async_engine(url, async_creator=lambda: asyncpg.connect(dsn), pool_size=5))


@pytest.mark.parametrize("make", [tenants, by_a_creator])
async def test_its_connections_say_which_worker_they_are_of_and_a_dead_one_is_replaced(
    engine: AsyncEngine, settings: Settings, make: Make
) -> None:
    async with a_work(of(settings, make)) as work:
        pid, name = await said(work, engine, "application_name")
        assert name == work.identity.application_name
        assert await said(work, engine, "application_name") == [pid, name]  # also after the reset

        driver = await _driver(work)
        await end_backend(engine, pid)
        await until(driver.is_closed, "our end has seen it")
        other, name = await said(work, engine, "application_name")

        assert other != pid
        assert name == work.identity.application_name


async def _driver(work: Work) -> Any:
    async with work.jobs_engine.connect() as connection:
        return (await connection.get_raw_connection()).driver_connection


async def test_an_engine_that_the_program_keeps_serves_one_worker_after_another(
    engine: AsyncEngine, settings: Settings, database_url: str
) -> None:
    kept = async_sessionmaker(create_async_engine(database_url, pool_size=5))
    for _ in range(2):
        async with a_work(of(settings, lambda _: kept)) as work:
            assert (await said(work, engine, "application_name"))[1] == work.identity.application_name
    async with kept() as session:
        name = (await session.execute(text("SHOW application_name"))).scalar_one()
    await kept.kw["bind"].dispose()

    assert not name.startswith("exarq")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pool_size": 2, "max_overflow": 1}, [PoolTooSmall(connections=3, concurrency=5)]),
        ({"pool_size": 2, "max_overflow": -1}, []),
        ({"poolclass": NullPool}, []),
    ],
)
async def test_a_pool_with_less_room_than_the_worker_has_attempts_is_reported(
    settings: Settings, options: dict[str, Any], told: list[Any]
) -> None:
    make = of(settings, lambda url: async_sessionmaker(create_async_engine(url, **options)))
    async with heard() as events, a_work(make):
        pass

    assert events == told


# ── what cannot work ────────────────────────────────────────────────────────────────────────────────────────────────


async def asynchronous(url: str) -> None: ...


def failing(url: str) -> None:
    raise ValueError("no\ncertificate")


def autocommitting(url: str) -> Any:
    return async_sessionmaker(create_async_engine(url, isolation_level="AUTOCOMMIT"))


def autocommitting_by_option(url: str) -> Any:
    return async_sessionmaker(create_async_engine(url).execution_options(isolation_level="AUTOCOMMIT"))


def refusal(make: Make) -> str:
    with pytest.raises(SettingsError) as refused:
        UserSessions("app.db:make", make, "postgresql+asyncpg://nowhere/none")
    return str(refused.value)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (asynchronous, "is an `async def`; write `def`"),
        (failing, "raised ValueError: no certificate"),
        (lambda url: create_async_engine(url), "returned a AsyncEngine; return async_sessionmaker(create_async"),
        (lambda url: sessionmaker(), "returned a sessionmaker; return async_sessionmaker("),
        (lambda url: async_sessionmaker(), "is bound to nothing; bind it to an engine"),
        (lambda url: async_sessionmaker(create_async_engine(url), twophase=True), "has twophase=True; leave it out"),
        (lambda url: async_sessionmaker(create_async_engine(url), binds={Session: 1}), "has `binds`; bind it to one"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make: Make, why: str) -> None:
    assert refusal(make).startswith(f"database.sessions: app.db:make {why}")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (autocommitting, "is in AUTOCOMMIT, where nothing commits together"),
        (autocommitting_by_option, "is in AUTOCOMMIT, where nothing commits together"),
        (
            lambda url: async_sessionmaker(create_async_engine(make_url(url).set(database="postgres"))),
            "leads to another database than database.url; use the address that it is given",
        ),
    ],
)
async def test_what_only_the_database_can_tell_is_refused_before_the_worker_shows_up(
    engine: AsyncEngine, settings: Settings, make: Make, why: str
) -> None:
    with pytest.raises(SettingsError, match=f"^database.sessions: {__name__}:make_sessions {why}"):
        async with a_work(of(settings, make)):
            pass

    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM exarq.worker"))).scalar_one() == 0


def asking_at_the_start(url: str) -> Any:
    return async_sessionmaker(create_async_engine(url, connect_args={"server_settings": {"search_path": "tenant"}}))


@needs_pgbouncer
async def test_what_a_pooler_refuses_the_users_engine_is_told_with_what_to_do_instead(
    engine: AsyncEngine, settings: Settings, servers: TestServers
) -> None:
    with a_pooler(servers.admin_url) as pooled:
        url = pooled.set(database=engine.url.database).render_as_string(hide_password=False)
        behind = settings.database.model_copy(update={"url": url, "pooler": "pgbouncer"})
        why = r"asks for what a pooler refuses \(unsupported startup parameter: search_path\); leave `server_settings` out"
        with pytest.raises(SettingsError, match=why):
            async with a_work(of(settings.model_copy(update={"database": behind}), asking_at_the_start)):
                pass
