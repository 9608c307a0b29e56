"""Let `exarq check` see each heartbeat of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from worker.heartbeats import HeartbeatFile
from worker.observe.events import HeartbeatFileFailed, emit
from worker.settings import Settings


@contextmanager
def heartbeat_file(
    settings: Settings, *, number: int = 1, of: int = 1, leader: int | None = None
) -> Iterator[Callable[[], None]]:
    """The function to call after each beat; a file that cannot be written is told once and changes nothing else.

    Args:
        settings: the worker's.
        number: which process this is.
        of: how many there should be.
        leader: the process that starts them, by its id; None: this one.

    """
    worker = settings.worker
    file = HeartbeatFile(
        worker.heartbeat_folder,
        settings.settings_key(),
        worker.lease.total_seconds(),
        number=number,
        of=of,
        leader=leader or os.getpid(),
    )
    ready = told = False

    def beaten() -> None:
        nonlocal ready, told
        try:
            if not ready:
                file.prepare()
            file.beat()
            ready = True
        except OSError as error:
            ready = False
            if not told:
                emit(HeartbeatFileFailed(file=str(error.filename), error=str(error.strerror)))
            told = True

    try:
        yield beaten
    finally:
        file.remove()
