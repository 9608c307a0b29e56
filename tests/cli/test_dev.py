"""`exarq dev`: its servers keep their data, other commands find them, and the worker runs the code as it is now."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import Command
from tests.cli.test_embedded import SETTINGS, left_in, processes_of
from tests.support import until
from worker.core.errors import EmbeddedServerError
from worker.embedded import kept
from worker.embedded.account import Account
from worker.embedded.kept import Kept, keep

CODE = """
from worker import JobContext, job

@job
async def version(ctx: JobContext) -> str:
    return "{}"
"""

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a loaded machine


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short folder that the servers' account can enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="x-", dir="/tmp"))
    folder.chmod(0o755)
    for name in ("t", "project"):
        (folder / name).mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def project(temporary: Path) -> Command:
    command = Command(temporary / "project", {"TMPDIR": str(temporary / "t")})
    command.write("settings.toml", SETTINGS)
    command.write("shop.py", CODE.format("one"))
    return command


def hear(stream: IO[str] | None, what: str) -> dict[str, Any]:
    """Read until an event says so."""
    assert stream is not None
    heard = []
    for line in stream:
        heard.append(line)
        if what in line:
            return dict(json.loads(line)) if line.startswith("{") else {}
    raise AssertionError(f"it ended before it said {what!r}:\n{''.join(heard)}")


async def result_of_a_job(project: Command) -> str:
    job_id = project("enqueue", "shop.version").out.strip()

    def shown() -> Any:
        job = project("jobs", "show", job_id, "--json").json
        return job if job["state"] == "succeeded" else None

    return str((await until(shown, "the job to succeed", limit=90))["result"])


def untracked(folder: Path) -> str:
    """What git would add."""
    git = ["git", "-c", "safe.directory=*", "-C", str(folder)]
    subprocess.run([*git, "init", "-q"], check=True)
    return subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout


async def test_the_data_survive_the_worker_reloads_and_nothing_else_is_left(project: Command, temporary: Path) -> None:
    with project.started("dev") as dev:
        hear(dev.stderr, "worker started")
        assert await result_of_a_job(project) == "one"

        project.write("shop.py", "def")
        hear(dev.stderr, "refused to start")
        project.write("shop.py", CODE.format("two"))
        hear(dev.stderr, "worker started")
        assert await result_of_a_job(project) == "two"

        second = project.cold("dev")
        dev.send_signal(signal.SIGINT)
        out, _ = dev.communicate(timeout=90)
    assert dev.returncode == 0
    assert f"psql -h {temporary / 't'}" in out
    assert "another `exarq dev` runs here" in second.error
    assert left_in(temporary / "t") == []
    assert processes_of(temporary) == []
    assert ".exarq" not in untracked(project.folder)

    with project.started("dev") as dev:
        hear(dev.stderr, "worker started")
        kept = project("jobs", "list", "--json").json
        dev.send_signal(signal.SIGTERM)
        dev.communicate(timeout=90)
    assert dev.returncode == 0
    assert [job["state"] for job in kept] == ["succeeded", "succeeded"]


def test_one_command_at_a_time_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_A_STOP", 0.0)

    with keep(tmp_path), pytest.raises(EmbeddedServerError, match="another `exarq dev` runs here"), keep(tmp_path):
        pass

    with keep(tmp_path):
        assert (tmp_path / ".exarq" / ".gitignore").read_text() == "*\n"


def test_root_keeps_data_where_the_servers_account_can_enter(temporary: Path) -> None:
    nobody = Account(65534, 65534)
    closed = temporary / "t" / ".exarq"
    closed.mkdir()
    closed.parent.chmod(0o700)

    assert Kept(temporary, 0).place(nobody) == temporary
    assert str(Kept(closed, 0).place(nobody)).startswith("/var/lib/exarq/")
    assert Kept(closed, 0).place(None) == closed


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's rights to give")
def test_a_cluster_that_was_half_made_is_made_anew(temporary: Path) -> None:
    with keep(temporary) as held:
        half = temporary / ".exarq" / "postgres.new"
        half.mkdir()
        (half / "PG_VERSION").touch()

        held.prepare(Account(65534, 65534))

        assert list(half.iterdir()) == []
        assert half.stat().st_uid == 65534


async def test_a_worker_without_its_tables_starts_once_they_are_there(exarq: Command, engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA exarq CASCADE"))

    with exarq.started("dev") as dev:
        hear(dev.stderr, "refused to start")
        assert exarq("db", "upgrade").code == 0
        hear(dev.stderr, "worker started")
        dev.send_signal(signal.SIGTERM)
        dev.communicate(timeout=90)
    assert dev.returncode == 0
