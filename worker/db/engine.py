"""Engines whose connections say who they are and notice a peer that went silent."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from worker.db.driver import Driver

# Half-open TCP is noticed within about ten seconds, by either end.
_KEEPALIVE = {"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3"}
_UNANSWERED_MS = 10_000

_NAMED = "exarq.named"

RESET_KEY: Final = "exarq.reset"
"""The key of a connection's `info` for the SQL that makes it as it was before an attempt; without it, `RESET`."""

# What a job can leave on a connection that outlives its transaction; RESET ALL leaves a role that was SET.
RESET: Final = (
    "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET SESSION AUTHORIZATION; RESET ALL; DISCARD TEMP"
)

# A plan may be kept from when the table held ten rows. Then it would read all of it, again and again.
_OTHER_WAYS: Final = ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "jit")
_BY_KEY_ONLY: Final = dict.fromkeys(_OTHER_WAYS, "off")

# Jobs that open a session of their own beside the attempt's must not wait for one another when all slots are taken.
FOR_SECOND_SESSIONS = 4


def through(pooler: str | None) -> dict[str, Any]:
    """What asyncpg must be told when each transaction may meet another backend: that none keeps a statement of ours.

    An unnamed statement is prepared, bound and executed before the pooler gives the backend away.
    """
    if pooler is None:
        return {}
    return {"statement_cache_size": 0, "prepared_statement_cache_size": 0, "prepared_statement_name_func": lambda: ""}


def processor_engine(
    url: str,
    *,
    application_name: Callable[[], str],
    connections: int,
    connect_timeout: timedelta,
    statement_timeout: timedelta,
    pooler: str | None = None,
) -> AsyncEngine:
    """An engine for Exarq's own short statements: rows by key, waits with a limit on both ends, errors without values.

    Behind a pooler on our end alone: settings of a connection are not those of its backend. But there each statement is
    planned anew, for the table as it is.
    """
    limit = statement_timeout.total_seconds()
    return _engine(
        url,
        application_name=application_name,
        connections=connections,
        connect_timeout=connect_timeout,
        overflow=0,
        pool_timeout=limit,
        server_settings={
            "statement_timeout": f"{limit * 1000:.0f}",
            "lock_timeout": f"{limit * 200:.0f}",
            "idle_in_transaction_session_timeout": f"{limit * 1000:.0f}",
            **_BY_KEY_ONLY,
        },
        pooler=pooler,
        hide_parameters=True,  # arguments and results are nothing for a log
        command_timeout=limit + 1,
    )


def jobs_engine(
    url: str,
    *,
    application_name: Callable[[], str],
    connections: int,
    connect_timeout: timedelta,
    pooler: str | None = None,
    hide_parameters: bool = True,
) -> AsyncEngine:
    """An engine for the jobs: one connection for each slot; how long a job may wait is the job's own timeout."""
    return _engine(
        url,
        application_name=application_name,
        connections=connections,
        connect_timeout=connect_timeout,
        overflow=FOR_SECOND_SESSIONS,
        pool_timeout=None,
        server_settings={},
        pooler=pooler,
        hide_parameters=hide_parameters,
    )


def _engine(
    url: str,
    *,
    application_name: Callable[[], str],
    connections: int,
    connect_timeout: timedelta,
    overflow: int,
    pool_timeout: float | None,
    server_settings: dict[str, str],
    pooler: str | None,
    hide_parameters: bool,
    **connect_args: Any,
) -> AsyncEngine:
    engine = create_async_engine(
        url,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=connections,
        max_overflow=overflow,
        pool_timeout=pool_timeout,
        pool_use_lifo=True,
        hide_parameters=hide_parameters,
        connect_args={
            "timeout": connect_timeout.total_seconds(),
            # A pooler refuses those that it does not know.
            "server_settings": {}
            if pooler
            else {"tcp_user_timeout": f"{_UNANSWERED_MS}", **_KEEPALIVE, **server_settings},
            **connect_args,
        },
    )

    introduce(engine, application_name, pooler)
    return engine


def introduce(
    engine: AsyncEngine, application_name: Callable[[], str], pooler: str | None = None
) -> Callable[[], None]:
    """Have its connections say who they are and notice a peer that went silent; returns the function that ends it.

    Args:
        engine: any engine of asyncpg's.
        application_name: what its connections are called from now on.
        pooler: what stands between us and PostgreSQL.

    """

    def say(_dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
        settings = {**parameters.get("server_settings", {}), "application_name": application_name()}
        parameters.update(through(pooler), server_settings=settings)
        parameters.setdefault("connection_class", Driver)

    def remember(_connection: Any, record: Any) -> None:
        record.info[_NAMED] = application_name()
        if pooler is not None:
            record.info[RESET_KEY] = ""  # after its transaction the backend is not ours

    def refuse_the_former(_connection: Any, record: Any, _proxy: Any) -> None:
        """Replace a connection with a former name: under that name a rescuer ends it."""
        if record.info.get(_NAMED) != application_name():
            raise DisconnectionError

    listeners: list[tuple[str, Callable[..., None]]] = [
        ("do_connect", say),
        ("connect", remember),
        ("connect", _watch_the_peer),
        ("checkout", _refuse_the_dead),
        ("checkout", refuse_the_former),
    ]
    for name, listener in listeners:
        event.listen(engine.sync_engine, name, listener)

    def end() -> None:
        for name, listener in listeners:
            event.remove(engine.sync_engine, name, listener)

    return end


def _refuse_the_dead(connection: Any, _record: Any, _proxy: Any) -> None:
    """Replace a pooled connection whose end was already seen: costs no round trip, unlike a ping."""
    if connection.driver_connection.is_closed():
        raise DisconnectionError


def _watch_the_peer(connection: Any, _record: Any) -> None:
    """Let the kernel find out, on our end, that the server is gone; asyncpg has no option for it."""
    transport = getattr(connection.driver_connection, "_transport", None)
    raw = transport.get_extra_info("socket") if transport else None
    if raw is None or raw.family == socket.AF_UNIX:
        return
    options = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": _UNANSWERED_MS}
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
