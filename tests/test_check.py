"""`exarq check` tells a living worker from a dead one by its files alone, and quickly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command
from tests.support import heard
from worker.heartbeats import HeartbeatFile
from worker.hooks import StartupFailed
from worker.observe.events import HeartbeatFileFailed
from worker.settings import load_settings
from worker.upkeep.heartbeat_file import heartbeat_file

HEAVY = {"arq", "pydantic", "rich", "sqlalchemy", "typer"}


@pytest.fixture
def bare(tmp_path: Path) -> Command:
    """The command in a folder of its own, whose heartbeat files are the test's alone."""
    (tmp_path / "here").mkdir()
    return Command(tmp_path / "here", {"EXARQ_WORKER_HEARTBEAT_FOLDER": str(tmp_path / "beats")})


def a_file(command: Command, **more: Any) -> HeartbeatFile:
    """The file of a worker that runs in the command's folder, and whose process is this one."""
    facts = {"lease": 600.0, "number": 1, "of": 1, "leader": os.getpid(), "key": command.folder, **more}
    file = HeartbeatFile(command.environment["EXARQ_WORKER_HEARTBEAT_FOLDER"], **facts)
    file.prepare()
    return file


def beat_long_ago(file: HeartbeatFile, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        now = time.monotonic()
        patch.setattr(time, "monotonic", lambda: now - 3400)
        file.beat()


def test_a_worker_that_beats_is_alive_until_it_ends(bare: Command) -> None:
    file = a_file(bare)
    file.beat()

    alive, told = bare.cold("check"), bare.cold("check", "--json")
    file.remove()
    ended = bare.cold("check")

    assert (alive.code, alive.out, alive.err) == (0, "", "")
    assert told.json["alive"] is True
    assert [(one["pid"], one["fresh"]) for one in told.json["processes"]] == [(os.getpid(), True)]
    assert (ended.code, ended.out) == (1, "")
    assert "no worker" in ended.err
    assert "start one with `exarq run`" in ended.err


def test_a_worker_that_lives_and_does_not_beat_is_not(bare: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    beat_long_ago(a_file(bare), monkeypatch)

    done = bare.cold("check", "--json")

    assert done.code == 1
    assert done.json["alive"] is False
    assert re.search(rf"process 1 of 1 \(pid {os.getpid()}\) last beat 34\d\d s ago, its lease is 600 s", done.err)


def test_every_process_below_one_parent_must_beat(bare: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = [a_file(bare, number=number, of=2) for number in (1, 2)]
    first.beat()

    missing = bare("check")
    second.beat()
    complete = bare("check")
    beat_long_ago(second, monkeypatch)
    stuck = bare("check")

    assert (missing.code, complete.code, stuck.code) == (1, 0, 1)
    assert "1 of 2 processes beat" in missing.err
    assert "process 2 of 2" in stuck.err


def test_a_killed_worker_is_dead_after_its_lease_and_then_forgotten(
    bare: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        killed = a_file(bare, leader=other.pid)
        killed.beat()
        just_killed = bare("check")
        other.kill()
    beat_long_ago(killed, monkeypatch)

    assert just_killed.code == 0
    assert bare("check").code == 1

    a_file(bare).beat()  # another took its place

    assert bare("check").code == 0
    assert not list(bare.folder.parent.glob(f"beats/{other.pid}-*"))


def test_the_worker_of_another_folder_does_not_answer(bare: Command) -> None:
    a_file(bare, key=bare.folder.parent).beat()

    assert bare("check").code == 1


def test_a_file_that_cannot_be_read_is_no_worker(bare: Command) -> None:
    file = a_file(bare)
    file.beat()
    (path,) = Path(bare.environment["EXARQ_WORKER_HEARTBEAT_FOLDER"]).iterdir()
    path.write_text('{"key": "')

    assert bare("check").code == 1


def test_the_folder_may_stand_in_the_settings_file(bare: Command, tmp_path: Path) -> None:
    bare.write("settings.toml", f"[worker]\nheartbeat_folder = '{tmp_path / 'there'}'\n")
    file = HeartbeatFile(
        str(tmp_path / "there"), bare.folder / "settings.toml", 600, number=1, of=1, leader=os.getpid()
    )
    file.prepare()
    file.beat()

    assert bare.cold("check", EXARQ_WORKER_HEARTBEAT_FOLDER="").code == 0


def test_a_settings_file_that_is_not_there_is_an_error(bare: Command) -> None:
    assert "EXARQ_SETTINGS: no file" in bare.cold("check", EXARQ_SETTINGS="nowhere.toml").error


def test_a_default_folder_that_somebody_else_prepared_is_not_believed(bare: Command, tmp_path: Path) -> None:
    folder = tmp_path / f"exarq-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    file = HeartbeatFile(str(folder), bare.folder, 600, number=1, of=1, leader=os.getpid())
    file.beat()

    assert bare.cold("check", EXARQ_WORKER_HEARTBEAT_FOLDER="", TMPDIR=str(tmp_path)).code == 1


def test_a_check_imports_nothing_heavy(bare: Command) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "worker", "check", "--json"],
        cwd=bare.folder,
        capture_output=True,
        text=True,
    )

    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert json.loads(done.stdout) == {"alive": False, "processes": []}
    assert "json" in imported
    assert not imported & HEAVY


async def test_a_folder_that_cannot_be_written_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    settings = load_settings(worker={"heartbeat_folder": str(tmp_path / "taken" / "beats")})

    async with heard() as events:
        with heartbeat_file(settings) as beaten:
            beaten()
            beaten()
            assert len([event for event in events if isinstance(event, HeartbeatFileFailed)]) == 1
            (tmp_path / "taken").unlink()
            beaten()
            assert len(list((tmp_path / "taken" / "beats").iterdir())) == 1
    assert list((tmp_path / "taken" / "beats").iterdir()) == []
    assert len(events) == 1


def test_no_file_stays_of_a_worker_that_could_not_start(tmp_path: Path) -> None:
    settings = load_settings(worker={"heartbeat_folder": str(tmp_path)})

    def start() -> None:
        with heartbeat_file(settings) as beaten:
            beaten()
            raise StartupFailed("the startup hook raised")

    with pytest.raises(StartupFailed):
        start()

    assert list(tmp_path.iterdir()) == []
