"""The user's own session factory: its classes, its engine and its options, in the service of a worker's attempts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from worker.core.errors import SchemaNotMigrated, SettingsError
from worker.core.outcome import ErrorText
from worker.db.driver import literal
from worker.db.engine import RESET, RESET_KEY, introduce
from worker.db.failures import refusal_by_a_pooler, schema_needed
from worker.db.reads import installation_id
from worker.db.session import AttemptSession, JobSession
from worker.db.transaction import guard

_SETTING: Final = "database.sessions"

_INSTEAD: Final = "leave `server_settings` out, and set them for the role: ALTER ROLE … SET …"

_SET_BY_THE_ENGINE: Final = (
    "SELECT name, current_setting(name) FROM pg_settings WHERE source = 'session'"
    " UNION ALL SELECT 'role', current_setting('role') WHERE current_setting('role') <> 'none'"
)


class UserSessions:
    """What the callable of `database.sessions` made, checked.

    Args:
        name: the callable's name, for messages.
        make: the callable; given the address of PostgreSQL, it returns an `async_sessionmaker` bound to an engine.
        url: that address.

    Raises:
        SettingsError: an attempt could not work with what it returned; the message says what to return instead.

    """

    def __init__(self, name: str, make: Callable[..., Any], url: str) -> None:
        self._name = name
        try:
            made = make(url)
        except Exception as error:  # code of anybody
            said = ErrorText.of(error)
            raise self._refused(f"raised {said.type}: {' '.join(said.message.split())}") from error
        self._factory, self.engine = self._checked(made)

    def as_workers(
        self, application_name: Callable[[], str], info: dict[str, Any], pooler: str | None = None
    ) -> tuple[async_sessionmaker[AsyncSession], Callable[[], None]]:
        """The factory of a worker, and the function that takes its listeners from the user's engine.

        Args:
            application_name: what the engine's connections are called from now on.
            info: what the `info` of every session holds besides the user's.
            pooler: what stands between us and PostgreSQL.

        """
        introduced = introduce(self.engine, application_name, pooler)
        settle = _say_and_remember(application_name)
        if pooler is None:
            event.listen(self.engine.sync_engine, "connect", settle)
        guard(self.engine)
        ours: dict[str, Any] = {
            "sync_session_class": _joining(self._factory),
            "join_transaction_mode": "rollback_only",
            "autobegin": True,
            "info": {**(self._factory.kw.get("info") or {}), **info},
        }

        def end() -> None:
            introduced()
            if pooler is None:
                event.remove(self.engine.sync_engine, "connect", settle)

        return async_sessionmaker(class_=_for_jobs(self._factory.class_), **{**self._factory.kw, **ours}), end

    @property
    def room(self) -> int | None:
        """How many connections its pool gives at once; None where it sets no limit."""
        pool = self.engine.pool
        if not isinstance(pool, QueuePool) or pool._max_overflow == -1:
            return None
        return pool.size() + pool._max_overflow

    async def check(self, installation: UUID) -> None:
        """Look whether its sessions have a transaction in the database of this installation.

        Raises: `SettingsError`, and what a database that is away raises.
        """
        try:
            found = await self._installation_found()
        except Exception as error:
            if said := refusal_by_a_pooler(error):
                raise self._refused(f"asks for what a pooler refuses ({said}); {_INSTEAD}") from error
            raise
        if found != installation:
            raise self._refused("leads to another database than database.url; use the address that it is given")

    async def _installation_found(self) -> UUID | None:
        async with self._factory.begin() as session:
            connection = await session.connection()
            if getattr((await connection.get_raw_connection()).dbapi_connection, "autocommit", False):
                raise self._refused("is in AUTOCOMMIT, where nothing commits together; leave that isolation_level out")
            try:
                with schema_needed():
                    return await installation_id(connection)
            except SchemaNotMigrated:
                return None

    def _checked(self, made: object) -> tuple[async_sessionmaker[AsyncSession], AsyncEngine]:
        if inspect.iscoroutine(made):
            made.close()
            raise self._refused("is an `async def`; write `def`, nothing needs to be awaited yet")
        if not isinstance(made, async_sessionmaker):
            raise self._refused(
                f"returned a {type(made).__name__}; return async_sessionmaker(create_async_engine(url))"
            )
        bind = made.kw.get("bind")
        if made.kw.get("binds"):
            raise self._refused("has `binds`; bind it to one engine, for an attempt has one transaction")
        if not isinstance(bind, AsyncEngine):
            kind = "nothing" if bind is None else f"an {type(bind).__name__}"
            raise self._refused(
                f"is bound to {kind}; bind it to an engine: async_sessionmaker(create_async_engine(url))"
            )
        if bind.dialect.driver != "asyncpg":
            raise self._refused(f"has an engine of {bind.dialect.driver}; use the address that it is given, of asyncpg")
        if made.kw.get("twophase"):
            raise self._refused("has twophase=True; leave it out, for an attempt's COMMIT is one statement")
        return made, bind

    def _refused(self, why: str) -> SettingsError:
        return SettingsError(f"{_SETTING}: {self._name} {why}")


def _joining(factory: async_sessionmaker[AsyncSession]) -> type[Session]:
    users: type[Session] = factory.kw.get("sync_session_class") or factory.class_.sync_session_class
    if issubclass(AttemptSession, users):
        return AttemptSession
    return type(users.__name__, (AttemptSession, users), {})


def _for_jobs(users: type[AsyncSession]) -> type[AsyncSession]:
    if issubclass(JobSession, users):
        return JobSession
    return type(users.__name__, (JobSession, users), {})


def _say_and_remember(application_name: Callable[[], str]) -> Callable[[Any, Any], None]:
    """What the engine itself has set on a connection is not a job's, and stays when the jobs' settings are reset."""

    def settle(connection: Any, record: Any) -> None:
        async def ask(driver: Any) -> str:
            # A creator of the user's own knows nothing of the name.
            if getattr(driver.get_settings(), "application_name", None) != application_name():
                await driver.execute(f"SET application_name = {literal(application_name())}")
            rows = await driver.fetch(_SET_BY_THE_ENGINE)
            return "".join(f"; SELECT set_config({literal(name)}, {literal(value)}, false)" for name, value in rows)

        record.info[RESET_KEY] = RESET + connection.run_async(ask)

    return settle
