"""Several processes below a parent: one of them dies, then the parent."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sqlalchemy import text

from tests.chaos import evidence, jobs, looks
from tests.chaos.checker import Excuse, Offence
from tests.chaos.faults import fault
from tests.chaos.processes import Process
from tests.chaos.stage import Stage

_PROCESSES = 2
_ROWS = text("SELECT count(*) FROM exarq.worker WHERE id = :id")


@dataclass(frozen=True)
class Child:
    """A process below a parent, and the id under which it works."""

    pid: int
    worker_id: UUID

    @property
    def runs(self) -> bool:
        """Whether it has not ended; one that has, and that its parent has not asked after, counts as ended."""
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False


@fault("workers")
async def processes(stage: Stage) -> None:
    """SIGKILL of one of two processes of `exarq run --processes 2`, then of their parent: the rest ends by itself."""
    lease = stage.pace.lease
    parent = stage.start_parent(_PROCESSES)
    try:
        await stage.until(lambda: len(_children(parent)) == _PROCESSES, "both processes begin", 120)
        ids = await stage.place(*[jobs.slow.call(lease / 2)] * 60)
        victim = await stage.until(lambda: _one_that_runs(stage, parent, ids), "one of them runs one of the jobs")
        _kill(stage, victim)
        await stage.until(lambda: _has_no_row(stage, victim), "its jobs are given back", 6 * lease + 30)
        await stage.until(lambda: len(_children(parent)) == _PROCESSES, "another takes its place", 120)
    finally:
        orphans = _children(parent)
        parent.send(signal.SIGKILL)
        await parent.ended(10)
    try:
        await stage.until(
            lambda: not any(child.runs for child in orphans), "they end without a parent", stage.pace.grace + 20
        )
    except TimeoutError as error:
        stage.offences.append(Offence("stops_in_order", parent.name, str(error)))
        for child in orphans:
            _kill(stage, child)


def _children(parent: Process) -> list[Child]:
    """Those that have begun and not ended."""
    found = []
    for path in parent.evidence.parent.glob(f"{parent.evidence.stem}.*.jsonl"):
        lines = [
            line
            for line in evidence.whole_lines(path.read_bytes())
            if line["what"] in ("WorkerStarted", "WorkerRenewed")
        ]
        if lines:
            found.append(Child(int(path.suffixes[0][1:]), UUID(lines[-1].get("new") or lines[-1]["worker"])))
    return [child for child in found if child.runs]


async def _one_that_runs(stage: Stage, parent: Process, ids: list[UUID]) -> Child | None:
    holders = await looks.holders(stage.engine, ids)
    return next((child for child in _children(parent) if child.worker_id in holders), None)


def _kill(stage: Stage, child: Child) -> None:
    stage.excuses.append(Excuse(child.worker_id, time.time()))
    stage.blows.append((child.worker_id, time.time()))
    with suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)


async def _has_no_row(stage: Stage, child: Child) -> bool:
    async with stage.engine.connect() as connection:
        return not (await connection.execute(_ROWS, {"id": child.worker_id})).scalar_one()
