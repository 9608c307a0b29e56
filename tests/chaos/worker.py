"""A worker process under test: Exarq's own worker, with listeners that note what happens outside the database."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import os
import select
import signal
import sys
import threading
import time
from typing import Any, Final

from tests.chaos import jobs
from tests.chaos.evidence import Evidence
from worker.observe import events
from worker.observe.events import Event, WorkerStarted, WorkerStopped
from worker.process import Worker, leave_threads_behind
from worker.settings import load_settings

FILE: Final = "CHAOS_EVIDENCE"
TWIN: Final = "CHAOS_TWIN"
KILL_AT: Final = "CHAOS_KILL_AT"
NO_LINES: Final = frozenset(
    {"HintsTaken", "JobsClaimed", "CommitSending", "FlushSending", "HintsDropping", "EffectWritten"}
    | {"AttemptEnded", "RescueCommitting", "ReconcileCommitting", "Pruned"}
    | {"TickCommitting", "Ticked"}
)
"""Events of every job: too many to note, and the tables tell the same."""


_LOOK_EVERY: Final = 0.05


def die_with_parent() -> None:
    """Nothing of a chaos run outlives it, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


def install_twin() -> None:
    """Break this process on purpose, if the run says so."""
    if twin := os.environ.get(TWIN):
        from tests.chaos.twins import TWINS  # only here: an honest process does not even load them

        TWINS[twin].install()


def main() -> None:
    """Run one worker until it is told to stop, or killed."""
    die_with_parent()
    evidence = jobs.evidence = Evidence.of_this_process(FILE)
    install_twin()
    if place := os.environ.get(KILL_AT):
        name, number = place.split(":")
        events.listen(Killer(name, int(number)))
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)  # where ARQ looks for it
    worker = Worker(load_settings())

    def listener(event: Event) -> None:
        note(evidence, event)
        if isinstance(event, WorkerStarted):
            evidence.note("clock", time=time.time())
        if isinstance(event, WorkerStopped):
            jobs_out = worker.ctx["engine"].pool.checkedout()
            evidence.note("pools", jobs=jobs_out, processor=worker.ctx["exarq.work"].processor.pool.checkedout())

    events.listen(listener)
    threading.Thread(target=note_stalls, args=(evidence, worker), name="stalls", daemon=True).start()
    worker.run()
    leave_threads_behind()


def note_stalls(evidence: Evidence, worker: Worker) -> None:
    """Note when this process got no time from the machine, or its threads none from a holder of the GIL."""
    last = time.monotonic()
    while True:
        select.select([], [], [], _LOOK_EVERY)  # libfaketime breaks time.sleep()
        now = time.monotonic()
        if now - last > 4 * _LOOK_EVERY:
            work = worker.ctx.get("exarq.work")
            evidence.note("stalled", seconds=round(now - last, 3), worker=work and work.identity.id)
        last = now


def note(evidence: Evidence, event: Event) -> None:
    """Note an event, unless it is one that every job has."""
    name = type(event).__name__
    if name not in NO_LINES:
        evidence.note(name, **{field.name: _plain(getattr(event, field.name)) for field in dataclasses.fields(event)})


class Killer:
    """Kills its own process at the nth event of one kind."""

    def __init__(self, name: str, number: int) -> None:
        self._name = name
        self._left = number

    def __call__(self, event: Event) -> None:
        if type(event).__name__ == self._name:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, (tuple, list)) else value


if __name__ == "__main__":
    main()
