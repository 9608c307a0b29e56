"""What a process below a parent imports as its jobs: ours, and listeners that note outside what happens in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tests.chaos import jobs
from tests.chaos.evidence import EPOCH, Evidence
from tests.chaos.worker import FILE, install_twin, note
from worker.observe import events
from worker.observe.events import Event, WorkerStopped

_NOT_TOLD: Final = WorkerStopped
"""Only a worker of our own can say how full its pools were."""


def evidence_of(parent: Path, pid: int) -> Path:
    """The file of one of the processes of the parent that has this file."""
    return parent.with_name(f"{parent.stem}.{pid}.jsonl")


def _listen() -> None:
    evidence = jobs.evidence = Evidence(evidence_of(Path(os.environ[FILE]), os.getpid()), float(os.environ[EPOCH]))

    def listener(event: Event) -> None:
        if not isinstance(event, _NOT_TOLD):
            note(evidence, event)

    events.listen(listener)


install_twin()
_listen()
