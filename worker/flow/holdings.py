"""What this process holds: the tokens of claims on their way, and the jobs it may write.

The heartbeat compares it with the database from its own thread, hence the lock.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from worker.core.remarks import NOTHING, Remarks
from worker.db.transitions import ClaimedJob, Held

_remarking: Final = threading.Lock()  # one for all: there is seldom anything to remark


class Because(StrEnum):
    """Why the worker cancels a function of its own."""

    LEASE_LOST = "the job is held by somebody else"
    CANCEL_REQUESTED = "somebody asked to cancel the job"
    STOPPING = "the worker stopped before the job had ended"
    TIMED_OUT = "it ran longer than its timeout"
    FENCED = "the worker could not beat for a whole lease"


@dataclass(eq=False, slots=True)
class Run:
    """One claimed attempt in this process, from the claim until how it ended is committed."""

    claimed: ClaimedJob
    task: asyncio.Task[None] | None = None
    started: float = field(default_factory=time.monotonic)
    in_function: bool = False
    cancelled_because: Because | None = None
    remarks: Remarks = NOTHING
    measured: bool = False  # its own steps say for how long it holds the loop; nobody need guess

    def cancel(self, reason: Because) -> bool:
        """Cancel the job's function; once it has returned, its completion is nobody's to interrupt."""
        if not self.in_function or self.task is None or self.cancelled_because is not None:
            return False
        self.cancelled_because = reason
        return self.task.cancel()

    def time_out(self) -> None:
        """Cancel the job's function, whatever it was told before."""
        if self.in_function and self.task is not None:
            self.cancelled_because = Because.TIMED_OUT
            self.task.cancel()

    def remark(self, **told: Any) -> None:
        """Add this to what there is to tell of the attempt; may be called from any thread."""
        with _remarking:
            self.remarks = replace(self.remarks, **told)

    def charge(self, seconds: float) -> None:
        """The job held the event loop for so long, once more."""
        with _remarking:
            blocked = (self.remarks.blocked or timedelta(0)) + timedelta(seconds=seconds)
            self.remarks = replace(self.remarks, blocked=blocked)


class Holdings:
    """The claims on their way and the jobs held by this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on_their_way: set[UUID] = set()
        self._runs: dict[Held, Run] = {}

    def claiming(self, token: UUID) -> None:
        """A claim with this token is about to be sent."""
        with self._lock:
            self._on_their_way.add(token)

    def claimed(self, token: UUID, jobs: Iterable[ClaimedJob]) -> list[Run]:
        """The claim was answered: these are held from now on."""
        runs = [Run(job) for job in jobs]
        with self._lock:
            self._runs.update((run.claimed.held, run) for run in runs)
            self._on_their_way.discard(token)
        return runs

    def forget(self, token: UUID) -> None:
        """The claim was not answered; what it took all the same, the next beat gives back."""
        with self._lock:
            self._on_their_way.discard(token)

    def let_go(self, held: Held) -> None:
        """How the attempt ended is committed, or somebody else holds the job."""
        with self._lock:
            self._runs.pop(held, None)

    def runs(self) -> dict[Held, Run]:
        """All that is held, at this moment."""
        with self._lock:
            return dict(self._runs)

    def unknown(self, running: Iterable[Held]) -> list[Held]:
        """Those of the rows that run under this worker's id which it knows nothing of."""
        with self._lock:
            return [held for held in running if held not in self._runs and held.token not in self._on_their_way]

    @property
    def suspect_running(self) -> float | None:
        """For how many seconds a suspect has been running here; None when none is."""
        with self._lock:
            started = [run.started for run in self._runs.values() if run.claimed.suspect]
        return time.monotonic() - min(started) if started else None
