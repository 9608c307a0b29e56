from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.embedded.servers import RunningServers, Servers, running, start


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A short temporary folder that every user can enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="x-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, open_folder: Path) -> Path:
    """A PATH on which a test puts what it needs; without that only the wheels are left."""
    programs = open_folder / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, open_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder of the test's own."""
    tmp_path_factory.getbasetemp()  # pytest must not make its own inside ours
    folder = open_folder / "t"
    folder.mkdir()
    folder.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with running() as servers:
        yield servers


@pytest.fixture
def only_redis() -> Iterator[RunningServers]:
    with start(postgres=False) as running_servers:
        yield running_servers
