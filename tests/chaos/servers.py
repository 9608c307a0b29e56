"""A PostgreSQL and a Redis that can be killed and started again, and of which nothing outlives this process."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import asyncpg
from redis.asyncio import Redis

from worker.core.errors import EmbeddedServerError
from worker.embedded import commands, guard
from worker.embedded.account import Account, server_account, temporary_base
from worker.embedded.binaries import find_postgres, find_redis
from worker.embedded.lifeline import Lifeline

_START_LIMIT = 60.0  # a loaded machine, and a recovery after a kill
_DURABLE = ("fsync", "synchronous_commit", "full_page_writes")


@dataclass(frozen=True)
class Home:
    """Where the servers live and as whom they run."""

    folder: Path
    account: Account | None

    @property
    def ids(self) -> list[int]:
        """The account as the guard takes it."""
        return list(self.account) if self.account else []


class Evicted(NamedTuple):
    """What was taken out of Redis: how many keys, and which members of sorted sets."""

    keys: int
    hints: list[str]


class _PrivateServer:
    """One server program, run again and again with the same command."""

    def __init__(self, name: str, home: Home, command: list[str], ending: signal.Signals) -> None:
        self._name = name
        self._home = home
        self._command = command
        self._ending = ending
        self._process: guard.Child | None = None
        self._starts = 0

    @property
    def pid(self) -> int:
        """The process id while it runs."""
        assert self._process is not None, f"{self._name} does not run"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has been started and neither stopped nor ended by itself."""
        try:
            return self._process is not None and not self._process.ended()
        except guard.Failed:
            return False

    async def end(self) -> None:
        """End it at once, if it runs, and return when it is gone."""
        if self._process is not None:
            self._process.end()
            await asyncio.to_thread(self._process.wait)
            self._process = None

    async def _launch(self, ready: Callable[[], bool]) -> float:
        assert not self.is_running, f"{self._name} runs already"
        begun = time.monotonic()
        self._starts += 1
        self._process = _child(f"{self._name}-{self._starts}", self._command, self._home, self._ending)
        await _until(self._process, ready)
        return time.monotonic() - begun


class PrivatePostgres(_PrivateServer):
    """A PostgreSQL whose commits are on disk; made by `private_servers`."""

    def __init__(self, home: Home) -> None:
        self._plan = commands.postgres_plan(home.folder, _wheels(find_postgres, home), fsync=True)
        super().__init__("postgres", home, self._plan["server"], signal.SIGQUIT)
        self.url = commands.postgres_url(home.folder)
        self.socket = Path(self._plan["socket"])
        self.data = Path(self._plan["data"])

    async def initialise(self) -> None:
        """Make the empty cluster, once."""
        initdb = _child("initdb", self._plan["initdb"], self._home, signal.SIGKILL)
        try:
            await _until(initdb, initdb.ended)
        finally:
            initdb.end()
            await asyncio.to_thread(initdb.wait)

    def copy(self, cluster: Path) -> None:
        """Begin with a copy of this cluster, whose server does not run."""
        subprocess.run(["cp", "-a", cluster, self.data], check=True)  # also keeps whose it is

    async def start(self) -> float:
        """Start it, recovering if need be; the seconds until it accepts connections."""
        return await self._launch(self._is_ready)

    async def kill_immediately(self) -> None:
        """End it as a crash does, no checkpoint made and no client told; returns when all of its processes are gone."""
        await self.end()

    async def restart(self) -> float:
        """Kill and start it; the seconds from the kill until it accepts connections again."""
        begun = time.monotonic()
        await self.kill_immediately()
        await self.start()
        return time.monotonic() - begun

    async def facts(self) -> dict[str, str]:
        """Its version and what makes a commit durable, as the server shows them; fails when one of these is off."""
        connection = await asyncpg.connect(host=str(self._home.folder), port=commands.PORT, user="postgres")
        try:
            shown = {name: str(await connection.fetchval(f"SHOW {name}")) for name in ("server_version", *_DURABLE)}
        finally:
            await connection.close()
        assert all(shown[name] == "on" for name in _DURABLE), f"this PostgreSQL may lose what it committed: {shown}"
        return shown

    def _is_ready(self) -> bool:
        return guard.postgres_answers(self._plan["pidfile"], self.pid)


class PrivateRedis(_PrivateServer):
    """A Redis that keeps nothing by itself and can come back as it was at a snapshot; made by `private_servers`."""

    def __init__(self, home: Home) -> None:
        plan = commands.redis_plan(home.folder, _wheels(find_redis, home))
        super().__init__("redis", home, plan["server"], signal.SIGKILL)
        self.url = commands.redis_url(home.folder)
        self.socket = Path(plan["socket"])
        self._dump = home.folder / "dump.rdb"  # loaded at each start if it is there
        self._snapshots = 0

    async def start(self, snapshot: Path | None = None) -> float:
        """Start it, empty or with what this snapshot holds; the seconds until it answers."""
        self._dump.unlink(missing_ok=True)
        if snapshot is not None:
            os.link(snapshot, self._dump)  # keeps the owner, and Redis replaces its file instead of writing into it
        return await self._launch(lambda: guard.redis_answers(str(self.socket)))

    async def stop(self) -> None:
        """Kill it with all it holds."""
        await self.end()

    async def snapshot(self) -> Path:
        """What it holds now, for a later `start`; the file is there as long as the servers' folder."""
        self._snapshots += 1
        kept = self._home.folder / f"snapshot-{self._snapshots}.rdb"
        async with self.client() as client:
            await client.save()
        self._dump.rename(kept)
        return kept

    async def flushall(self) -> None:
        """Delete everything."""
        async with self.client() as client:
            await client.flushall()

    async def evict(self, share: float, rng: random.Random) -> Evicted:
        """Delete this share (rounded up) of the keys of every kind, then of the members of the sorted sets left."""
        async with self.client() as client:
            keys = sorted([key async for key in client.scan_iter(count=1000)])
            gone = _sample(keys, share, rng)
            of_gone_keys = [await client.zrange(key, 0, -1) for key in gone if await client.type(key) == b"zset"]
            hints = [member.decode(errors="replace") for members in of_gone_keys for member in members]
            if gone:
                await client.delete(*gone)
            for key in sorted([key async for key in client.scan_iter(count=1000, _type="zset")]):
                if members := _sample(sorted(await client.zrange(key, 0, -1)), share, rng):
                    await client.zrem(key, *members)
                    hints += [member.decode(errors="replace") for member in members]
        return Evicted(len(gone), hints)

    async def facts(self) -> dict[str, str]:
        """Its version."""
        async with self.client() as client:
            said = await client.info("server")
        name = str(said.get("server_name", "redis"))
        return {"server": name, "server_version": str(said.get(f"{name}_version", said["redis_version"]))}

    def client(self) -> Redis:
        """A client that goes straight to it."""
        return Redis(unix_socket_path=str(self.socket))


class PrivateServers(NamedTuple):
    """Both servers."""

    postgres: PrivatePostgres
    redis: PrivateRedis


@asynccontextmanager
async def private_servers(cluster: Path | None = None) -> AsyncIterator[PrivateServers]:
    """Both servers, started; when the block ends, or this process in any way, they and their folder are gone.

    Args:
        cluster: begin with a copy of this one; its server does not run.

    """
    async with _home() as home, _postgres(home, cluster) as postgres, _redis(home) as redis:
        yield PrivateServers(postgres, redis)


@asynccontextmanager
async def private_postgres() -> AsyncIterator[PrivatePostgres]:
    """PostgreSQL alone."""
    async with _home() as home, _postgres(home) as postgres:
        yield postgres


@asynccontextmanager
async def private_redis() -> AsyncIterator[PrivateRedis]:
    """Redis alone."""
    async with _home() as home, _redis(home) as redis:
        yield redis


@asynccontextmanager
async def _home() -> AsyncIterator[Home]:
    """A folder that a guard removes, however this process ends; what runs there we start ourselves, again and again."""
    account = server_account()
    line = await asyncio.to_thread(Lifeline, temporary_base(account), account)
    try:
        folder = await asyncio.to_thread(line.folder)
        await asyncio.to_thread(line.start, commands.Plan(postgres=None, redis=None))
        yield Home(folder, account)
    finally:
        await asyncio.to_thread(line.cut)


@asynccontextmanager
async def _postgres(home: Home, cluster: Path | None = None) -> AsyncIterator[PrivatePostgres]:
    postgres = PrivatePostgres(home)
    try:
        if cluster is None:
            await postgres.initialise()
        else:
            postgres.copy(cluster)
        await postgres.start()
        await postgres.facts()
        yield postgres
    finally:
        await postgres.end()


@asynccontextmanager
async def _redis(home: Home) -> AsyncIterator[PrivateRedis]:
    redis = PrivateRedis(home)
    try:
        await redis.start()
        yield redis
    finally:
        await redis.end()


def _wheels(find: Callable[[Path, Account | None], Path], home: Home) -> Path:
    """The wheel's program, so that the versions are the same on every machine; else what is on PATH."""
    try:
        with tempfile.TemporaryDirectory() as nothing, patch.dict(os.environ, PATH=nothing):
            return find(home.folder, home.account)
    except EmbeddedServerError:
        return find(home.folder, home.account)


def _child(name: str, command: list[str], home: Home, ending: signal.Signals) -> guard.Child:
    # Never in a thread of a pool: the kernel ends the child when the thread that forked it ends.
    return guard.Child(name, command, home.folder, home.ids, ending)


async def _until(child: guard.Child, ready: Callable[[], bool]) -> None:
    ends = time.monotonic() + _START_LIMIT
    while not await asyncio.to_thread(ready):  # it may wait for an answer
        assert not child.ended() or ready(), f"{child.name} ended before it was ready"
        assert time.monotonic() < ends, f"{child.name} was not ready within {_START_LIMIT:g} s"
        await asyncio.sleep(0.005)


def _sample(found: list[Any], share: float, rng: random.Random) -> list[Any]:
    return rng.sample(found, math.ceil(len(found) * share))
