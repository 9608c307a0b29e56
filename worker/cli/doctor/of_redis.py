"""Redis: whether it answers, whether it may throw hints away, and whether anybody can reach it."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import uuid4

from arq.connections import ArqRedis
from redis.exceptions import ResponseError

from worker.broker import messages, scripts
from worker.broker.connection import UNREACHABLE, connect
from worker.broker.hints import Hint, due_at
from worker.broker.keys import PAYLOAD_PREFIX, wake_key
from worker.broker.messages import Cancelled
from worker.cli.doctor.finding import Finding, error, ok, warning
from worker.cli.doctor.of_postgres import clock
from worker.core.priority import DEFAULT_PRIORITY
from worker.settings import Settings
from worker.settings.values import masked

_LEAST_VERSION: Final = (6, 2)  # ZMSCORE
_LOOPBACK: Final = {"127.0.0.1", "::1", "localhost"}


async def look(settings: Settings, url: str) -> list[Finding]:
    """All findings of Redis."""
    redis = connect(url, timeout=settings.redis.timeout)
    try:
        await redis.ping()
        info: dict[str, Any] = {}
        with suppress(ResponseError):  # this user may not ask
            info = await redis.info("everything")
        return [
            _version(info),
            *await _publishes(redis),
            *_role(info),
            *_memory(info),
            *await _reach(redis),
            await _clock(redis),
        ]
    except UNREACHABLE as away:
        found = f"does not answer at {masked(url)} ({type(away).__name__}: {away})"
        return [error("Redis", found, "start it, or correct EXARQ_REDIS_URL; until then workers scan PostgreSQL")]
    finally:
        await redis.aclose()


def _version(info: dict[str, Any]) -> Finding:
    version = str(info.get("redis_version", ""))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not numbers:
        return ok("Redis", "answers")
    if numbers < _LEAST_VERSION:
        return error("Redis", f"version {version}", f"Exarq needs {'.'.join(map(str, _LEAST_VERSION))} or newer")
    valkey = info.get("valkey_version")
    return ok("Redis", f"Valkey {valkey}" if valkey else f"Redis {version}")


# What Redis says, and what to do about it.
_REMEDIES: Final = {
    "maxmemory": "raise maxmemory, or remove what fills it; until then workers scan PostgreSQL",
    "MISCONF": "it cannot save to its disk: make room there, or correct what its log names",
    "read only replica": "point EXARQ_REDIS_URL at the primary",
    "ACL failure": "allow it the keys arq:*, exarq:* and those of your queues (ACL SETUSER … ~*)",
    "permission": "allow it EVAL and what scripts call (ACL SETUSER … +@all), and the keys of Exarq",
}


async def _publishes(redis: ArqRedis) -> list[Finding]:
    """Whether a hint and a message can be published, tried with a queue and an installation that nobody has."""
    queue, job, nobody = f"exarq:doctor:{uuid4()}", uuid4(), uuid4()
    hint = Hint(job, "exarq.doctor", queue, due_at(0), enqueued_ms=0, installation=nobody, priority=DEFAULT_PRIORITY)
    try:
        await scripts.publish(redis, [hint], lease=timedelta(seconds=1))
        await redis.delete(queue, wake_key(queue), f"{PAYLOAD_PREFIX}{job}")
    except ResponseError as refused:
        said = str(refused)
        advice = next((remedy for word, remedy in _REMEDIES.items() if word in said), "correct what Redis names")
        return [error("scripts", f"a hint cannot be published ({said.splitlines()[0]})", advice)]
    try:
        await messages.tell(redis, [Cancelled(job, nobody)])
    except ResponseError as refused:
        advice = (
            "cancelling and results take seconds; allow it PUBLISH and SUBSCRIBE on exarq:* (ACL SETUSER … &exarq:*)"
        )
        return [ok("scripts", "a hint can be published"), warning("messages", str(refused).splitlines()[0], advice)]
    return [ok("scripts", "a hint can be published"), ok("messages", "can be published")]


def _role(info: dict[str, Any]) -> list[Finding]:
    if info.get("role") != "slave":
        return []
    return [error("role", "a read-only replica", "point EXARQ_REDIS_URL at the primary")]


def _memory(info: dict[str, Any]) -> list[Finding]:
    policy, limit = info.get("maxmemory_policy"), info.get("maxmemory")
    if policy is None:
        return []
    if limit and policy != "noeviction":
        return [
            warning(
                "eviction",
                f"maxmemory-policy is {policy}",
                "it may throw hints away, which reconcile brings back later; set noeviction",
            )
        ]
    return [ok("eviction", f"{policy}{'' if limit else ', no maxmemory'}")]


async def _reach(redis: ArqRedis) -> list[Finding]:
    """Whether anybody who reaches its port may use it."""
    try:
        names: list[Any] = ["protected-mode", "requirepass", "bind", "port", "tls-port"]
        config = {name: found for one in names for name, found in (await redis.config_get(one)).items()}
        user = await redis.acl_getuser("default")
    except ResponseError:  # this user may not ask, which is as it should be
        return [ok("open to others", "this user may not ask, so somebody has thought of it")]
    bound = {word.lstrip("-") for word in str(config.get("bind", "")).split()}
    listens = any(config.get(name, "0") != "0" for name in ("port", "tls-port"))
    no_password = not config.get("requirepass") and "nopass" in (user or {}).get("flags", [])
    everywhere = not bound or not bound <= _LOOPBACK
    if not (listens and everywhere and no_password and config.get("protected-mode") == "no"):
        return [ok("open to others", "no")]
    where = ", ".join(sorted(bound)) or "every address"
    found = f"listens on {where} without a password, protected-mode is off"
    return [warning("open to others", found, "set a password (requirepass or ACL), or bind 127.0.0.1")]


async def _clock(redis: ArqRedis) -> Finding:
    before, asked = time.monotonic(), datetime.now(UTC)
    seconds, micros = await redis.time()
    ours = asked + timedelta(seconds=(time.monotonic() - before) / 2)
    return clock("clock of Redis", ours, datetime.fromtimestamp(seconds + micros / 1e6, UTC))
