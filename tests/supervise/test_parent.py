"""The parent keeps its processes through whatever ends one of them; these say and do only what a test needs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import heard, until
from worker.observe.events import Event, ProcessDied, ProcessRefused, ProcessRescued, StepFailed
from worker.settings import Settings
from worker.supervise.parent import Parent

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine

_PROCESS = """
import os, pathlib, signal, socket, sys, uuid
place, _, file = sys.argv[-1].rpartition(":")
line = socket.socket(fileno=int(file))
folder = pathlib.Path(sys.argv[1])

def note(what):
    with open(folder / "notes", "a") as notes:
        notes.write(f"{what} {place[0]} {os.getpid()}\\n")

def work():
    line.sendall(f"{uuid.uuid4()}\\n".encode())
    note("works")

def wait_for_an_order():
    line.recv(100)

def is_there(name):
    return (folder / name).exists()

note("starts")
"""


@dataclass
class Family:
    """A parent that runs in this process, and what is known of its processes."""

    parent: Parent
    running: asyncio.Task[int]
    events: list[Event]
    folder: Path

    def pids(self, what: str, number: int = 1) -> list[int]:
        """The ids of the processes that have noted this in a place, one after the other."""
        file = self.folder / "notes"
        notes = [note.split() for note in file.read_text().splitlines()] if file.exists() else []
        return [int(pid) for noted, place, pid in notes if noted == what and int(place) == number]

    def told(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


@asynccontextmanager
async def a_family(
    settings: Settings,
    folder: Path,
    does: str,
    *,
    processes: int = 1,
    renewable: bool = False,
    python: str = sys.executable,
) -> AsyncIterator[Family]:
    """A parent whose processes do what the lines say; it is stopped at the end of the block."""
    of_many = settings.worker.model_copy(update={"processes": processes})
    command: Sequence[str] = [python, "-c", _PROCESS + does, str(folder)]
    parent = Parent(settings.model_copy(update={"worker": of_many}), command, renewable=renewable)
    async with heard() as events:
        running = asyncio.create_task(parent.run())
        try:
            await until(lambda: events, "the parent runs")
            yield Family(parent, running, events, folder)
        finally:
            if not running.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await running


async def test_a_restart_that_refuses_is_tried_again_and_leaves_the_others_alone(
    settings: Settings, tmp_path: Path
) -> None:
    does = "if is_there('broken'): sys.exit(2)\nwork(); wait_for_an_order()"
    async with a_family(settings, tmp_path, does, processes=2) as family:
        await until(lambda: family.pids("works", 1) and family.pids("works", 2), "both work")
        broken = tmp_path / "broken"
        broken.touch()

        os.kill(family.pids("works", 2)[0], signal.SIGKILL)
        await until(lambda: len(family.told(ProcessDied)) == 2, "its restart refuses")
        broken.unlink()

        await until(lambda: len(family.pids("works", 2)) == 2, "it is started again")
        assert not family.running.done()
        assert len(family.pids("starts", 1)) == 1
    died = [event for event in family.events if isinstance(event, ProcessDied)]
    assert [(event.process, event.how, event.restart_in) for event in died] == [
        (2, "SIGKILL", 0.5),
        (2, "exit code 2", 1.0),
    ]
    assert family.running.result() == 0


async def test_a_process_that_cannot_be_started_is_tried_again(settings: Settings, tmp_path: Path) -> None:
    python = tmp_path / "python"
    async with a_family(settings, tmp_path, "work(); wait_for_an_order()", python=str(python)) as family:
        await until(lambda: family.told(StepFailed), "the system refuses to start it")
        assert not family.running.done()

        python.symlink_to(sys.executable)

        await until(lambda: family.pids("works"), "it works")
    assert family.running.result() == 0


async def test_a_process_that_refuses_while_it_is_to_stop_holds_nothing_up(settings: Settings, tmp_path: Path) -> None:
    does = "wait_for_an_order(); sys.exit(2)"
    async with a_family(settings, tmp_path, does, renewable=True) as family:
        await until(lambda: family.pids("starts"), "it starts")

        os.kill(os.getpid(), signal.SIGINT)

        await until(family.running.done, "the parent ends")


@pytest.mark.parametrize("end", ["sys.exit(2)", "os.kill(os.getpid(), signal.SIGTERM)", "work(); sys.exit(1)"])
async def test_a_change_of_the_code_starts_a_process_anew_however_the_former_ends(
    settings: Settings, tmp_path: Path, end: str
) -> None:
    does = f"""
if is_there("change"):
    work(); wait_for_an_order(); sys.exit(0)
note("old")
wait_for_an_order()
{end}
"""
    async with a_family(settings, tmp_path, does, renewable=True) as family:
        await until(lambda: family.pids("old"), "it starts with the former code")
        (tmp_path / "change").touch()
        family.parent.renew()
        await until(lambda: family.pids("starts")[1:] == family.pids("works")[-1:] != [], "another works")
    assert not [*family.told(ProcessDied), *family.told(ProcessRefused)]
    assert len(family.told(ProcessRescued)) == end.count("work()")
    assert family.running.result() == 0
