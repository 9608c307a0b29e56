"""`exarq run` on embedded settings: it brings its servers and takes them away."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import JOBS, Command
from tests.support import until

SETTINGS = "[database]\nurl = 'embedded'\n[redis]\nurl = 'embedded'\n[jobs]\nmodules = ['shop']\n"

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a loaded machine


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short temporary folder that the servers' account can enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="x-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def embedded(tmp_path: Path, temporary: Path) -> Command:
    command = Command(tmp_path, {"TMPDIR": str(temporary)})
    command.write("settings.toml", SETTINGS)
    command.write("shop.py", JOBS)
    return command


def left_in(folder: Path) -> list[Path]:
    """Files, and folders with something in them."""
    return [path for path in folder.rglob("*") if not path.is_dir()]


def processes_of(folder: Path) -> list[str]:
    """The command lines of living processes that name the folder."""
    found = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if str(folder) in line]


def test_a_burst_starts_servers_says_that_they_are_temporary_and_leaves_nothing(
    embedded: Command, temporary: Path
) -> None:
    done = embedded.cold("run", "--burst")

    first = done.err.splitlines()[0]
    assert (done.code, done.out) == (0, "")
    assert first == ("note: embedded PostgreSQL and Redis started; the data are temporary and end with this command")
    assert left_in(temporary) == []
    assert processes_of(temporary) == []


def test_a_worker_that_fails_to_start_takes_its_servers_along(embedded: Command, temporary: Path) -> None:
    embedded.write("shop.py", "")

    done = embedded.cold("run")

    assert done.code == 2
    assert "jobs.modules" in done.err.splitlines()[-1]
    assert left_in(temporary) == []
    assert processes_of(temporary) == []


async def test_other_commands_find_the_servers_of_a_running_worker(embedded: Command, temporary: Path) -> None:
    with embedded.started("run") as process:
        await until(lambda: any(temporary.rglob("*.json")), "announced servers", limit=90)

        job_id = embedded("enqueue", "shop.charge", '{"invoice_id": 7}').out.strip()
        await until(
            lambda: (
                [line["id"] for line in embedded("jobs", "list", "--json", "--state", "succeeded").json] == [job_id]
            ),
            "the job to succeed",
        )
        second = embedded.cold("run", "--burst")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (0, "")
    assert "worker stopped" in err
    assert second.code == 0
    assert "using the embedded servers of another command" in second.err
    assert left_in(temporary) == []
    assert processes_of(temporary) == []
