from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.embedded.helpers import HOLDER, alive, ask, holder, installation_for, parent_of, ping, processes_in, wait_for
from worker.embedded.account import server_account
from worker.embedded.guard import remove
from worker.embedded.servers import start

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


def test_a_parent_killed_with_sigkill_leaves_neither_processes_nor_folder() -> None:
    with holder() as parent:
        guard = parent_of(parent.servers[0])

        parent.process.kill()

        wait_for(parent.nothing_is_left)
        wait_for(lambda: not alive(guard))


def test_a_parent_killed_while_the_servers_start_leaves_nothing(temporary: Path) -> None:
    program = """
import json, os, signal, sys
from worker.embedded import lifeline
def die(self, word):
    os.kill(os.getpid(), signal.SIGKILL)
hear = lifeline.Lifeline._hear
lifeline.Lifeline._hear = lambda self, word: die(self, word) if word == "ready" else hear(self, word)
from worker.embedded.guard import remove
from worker.embedded.servers import start
print("{}", flush=True)
start()
"""
    with holder(program, env=os.environ | {"TMPDIR": str(temporary)}) as parent:
        assert parent.process.wait(90) == -signal.SIGKILL

        wait_for(lambda: not list(temporary.iterdir()) and not processes_in(temporary))


def test_a_process_forked_from_the_parent_does_not_keep_the_servers() -> None:
    program = f"""{HOLDER}
import os, signal
child = os.fork()
if not child:
    signal.pause()
print(child, flush=True)
"""
    with holder(program) as parent:
        assert parent.process.stdout is not None
        child = int(parent.process.stdout.readline())
        try:
            parent.process.kill()

            wait_for(parent.nothing_is_left)
            assert alive(child)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a process to its parent's end")
def test_a_guard_killed_with_sigkill_leaves_no_server_process() -> None:
    with holder() as parent:
        everything = [*parent.servers, *processes_in(parent.folder)]

        os.kill(parent_of(parent.servers[0]), signal.SIGKILL)

        wait_for(lambda: not any(alive(pid) for pid in everything) and not processes_in(parent.folder))
    remove(parent.folder)


def test_stop_sweeps_up_after_a_guard_that_was_killed() -> None:
    servers = start()
    os.kill(parent_of(servers.urls.postgres_pid), signal.SIGKILL)

    servers.stop()

    assert not servers.urls.folder.exists()
    wait_for(lambda: not alive(servers.urls.postgres_pid) and not alive(servers.urls.redis_pid))


async def test_servers_run_for_an_ordinary_user(open_folder: Path) -> None:
    account = server_account()
    options: dict[str, Any] = {}
    if account is None:  # we are that user, and so were all other tests
        python = sys.executable
    else:
        python, environment = installation_for(account, open_folder)
        options = {"env": environment, "cwd": "/", **account.drop}

    with holder(python=python, **options) as parent:
        assert await ask(parent.said["database_url"], "select 1") == 1
        assert await ping(parent.said["redis_url"]) is True
        owner = account.uid if account else os.getuid()
        assert parent.folder.stat().st_uid == owner
        assert (parent.folder / "redis.log").stat().st_uid == owner  # written by the guard: no root anywhere

        parent.process.kill()

        wait_for(parent.nothing_is_left)
