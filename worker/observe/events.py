"""What happened, as typed records. The flow emits them; logs, metrics and traces listen."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Event:
    """The base of every event; `level` is how loud a log says it."""

    level: ClassVar[int] = logging.INFO
    text: ClassVar[str] = ""

    @property
    def fields(self) -> dict[str, Any]:
        """What it says, by name."""
        names: tuple[str, ...] = self.__match_args__  # each field, as for every dataclass
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        """What a handler of the user's writes: the text, and each field that says something."""
        said = (f"{name}={value}" for name, value in self.fields.items() if value is not None)
        return " ".join([self.text, *said])


Listener = Callable[[Event], None]
_listeners: list[Listener] = []
_logger = logging.getLogger("exarq")


def listen(listener: Listener) -> Callable[[], None]:
    """Have every event from now on given to `listener`, in the thread it happens in; returns the function that ends it.

    Whatever a listener raises is reported and changes nothing, `sys.exit()` included.
    """
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def is_listening(listener: Listener) -> bool:
    """Whether this listener is given the events."""
    return listener in _listeners


def emit(event: Event) -> None:
    """Tell the listeners; one that raises is reported and stops neither the worker nor the other listeners."""
    for listener in tuple(_listeners):
        try:
            listener(event)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # a person has pressed Ctrl-C, wherever the program was
            # Also sys.exit() and a cancellation that the listener passes on: it only listens.
            with suppress(Exception):  # where even the report cannot be written
                _logger.error("an event listener failed on %s", type(event).__name__, exc_info=error)


@dataclass(frozen=True, slots=True)
class WorkerStarted(Event):
    """The worker beats and claims."""

    text = "worker started"
    worker: UUID
    queues: tuple[str, ...]
    concurrency: int
    jobs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QueuesUnused(Event):
    """The worker takes from queues that none of its definitions uses; an enqueue may still name one of them."""

    level = logging.WARNING
    text = "no definition uses these queues: only jobs run from them that were enqueued with queue=…; mistyped?"
    queues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkerStopping(Event):
    """No more claims; what runs may end within the grace."""

    text = "stopping: no more claims, running jobs may end; a second signal gives them back at once"
    worker: UUID
    reason: str
    running: int
    grace: float


@dataclass(frozen=True, slots=True)
class WorkerStopped(Event):
    """The worker's row is gone."""

    text = "worker stopped"
    worker: UUID
    succeeded: int
    failed: int
    retried: int
    released: int


@dataclass(frozen=True, slots=True)
class AttemptEnded(Event):
    """An attempt ended, and how is committed."""

    text = "attempt ended"
    name: str
    outcome: str
    job: UUID
    attempt: int
    seconds: float
    error: str | None = None
    blocked: float | None = None  # seconds for which it held the event loop


@dataclass(frozen=True, slots=True)
class HintsTaken(Event):
    """Redis has handed out hints; their jobs are not claimed yet."""

    level = logging.DEBUG
    text = "hints taken"
    queue: str
    hints: int


@dataclass(frozen=True, slots=True)
class JobsClaimed(Event):
    """These jobs run under this worker's id from now on; their functions have not been called yet."""

    level = logging.DEBUG
    text = "jobs claimed"
    jobs: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class CommitSending(Event):
    """All that an attempt wrote and its success are about to be committed."""

    level = logging.DEBUG
    text = "committing"
    job: UUID


@dataclass(frozen=True, slots=True)
class FlushSending(Event):
    """The successes of jobs that wrote nothing are about to be stored."""

    level = logging.DEBUG
    text = "storing successes"
    jobs: int


@dataclass(frozen=True, slots=True)
class HintsDropping(Event):
    """Hints of jobs that wait no longer are about to leave Redis."""

    level = logging.DEBUG
    text = "dropping hints"
    queue: str
    hints: int


@dataclass(frozen=True, slots=True)
class StaleWriteRefused(Event):
    """An attempt had lost its job; everything it wrote was rolled back."""

    level = logging.WARNING
    text = "lease lost: what this attempt wrote was rolled back"
    job: UUID
    name: str


@dataclass(frozen=True, slots=True)
class RunCancelled(Event):
    """The worker cancelled a run of its own."""

    level = logging.WARNING
    text = "run cancelled"
    job: UUID
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class CommitInDoubt(Event):
    """The answer to a COMMIT was lost; the row was asked instead."""

    level = logging.WARNING
    text = "the answer to COMMIT was lost; asked the row"
    job: UUID
    committed: bool


@dataclass(frozen=True, slots=True)
class ClaimForgotten(Event):
    """Rows ran under this worker's id that it did not know; they were given back."""

    level = logging.WARNING
    text = "gave back jobs whose claim was never answered"
    jobs: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class HintLeftAlone(Event):
    """A hint that is not this installation's."""

    level = logging.WARNING
    text = "left a hint alone that is not ours"
    hint: str
    owner: str


@dataclass(frozen=True, slots=True)
class JobsAdopted(Event):
    """Jobs that plain ARQ code had put into Redis have rows."""

    text = "adopted jobs of plain ARQ"
    jobs: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class PlainJobExpired(Event):
    """Ids of plain ARQ whose payloads were gone before they were adopted, so that nobody knows what they were."""

    level = logging.WARNING
    text = "plain ARQ jobs had expired, or lost their payloads, before they were adopted"
    hints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PicklesTrusted(Event):
    """A pickle of anybody's is about to be read that may hold more than data."""

    level = logging.WARNING
    text = "reading pickles that run what they say; end it with jobs.arq_pickles = 'plain' (EXARQ_JOBS_ARQ_PICKLES)"


@dataclass(frozen=True, slots=True)
class QueueKeyTaken(Event):
    """The key of a queue holds something of somebody else's; its jobs are found by a scan only while Redis is away."""

    level = logging.ERROR
    text = "a queue's key in Redis holds something else; give the queue another name"
    queue: str
    error: str


@dataclass(frozen=True, slots=True)
class RedisAway(Event):
    """Redis does not answer; jobs are claimed from PostgreSQL."""

    level = logging.WARNING
    text = "Redis is away; claiming from PostgreSQL"
    error: str


@dataclass(frozen=True, slots=True)
class RedisBack(Event):
    """Redis answers again."""

    text = "Redis is back"


@dataclass(frozen=True, slots=True)
class PublishFailed(Event):
    """Hints were not put into Redis; reconcile brings them."""

    level = logging.WARNING
    text = "hints not published; reconcile will"
    hints: int
    error: str


@dataclass(frozen=True, slots=True)
class StepFailed(Event):
    """A step of the worker failed and will be tried again."""

    level = logging.WARNING
    text = "step failed, will try again"
    step: str
    error: str


@dataclass(frozen=True, slots=True)
class PoolTooSmall(Event):
    """The engine that `database.sessions` made gives fewer connections than attempts run at once: some will wait."""

    level = logging.WARNING
    text = "the pool of database.sessions is smaller than worker.concurrency; raise its pool_size"
    connections: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class HookFailed(Event):
    """The user's shutdown hook raised or hung; the worker stops all the same."""

    level = logging.ERROR
    text = "shutdown hook failed"
    hook: str
    error: str


@dataclass(frozen=True, slots=True)
class RescueCommitting(Event):
    """The jobs of a dead worker are given back in a transaction that is about to commit."""

    level = logging.DEBUG
    text = "committing a rescue"
    worker: UUID
    jobs: int


@dataclass(frozen=True, slots=True)
class WorkerRescued(Event):
    """A worker stopped beating; its jobs were given back."""

    level = logging.WARNING
    text = "rescued the jobs of a worker that stopped beating"
    worker: UUID
    jobs: int
    blamed: int
    failed: int


@dataclass(frozen=True, slots=True)
class ReconcileCommitting(Event):
    """A page of waiting jobs was compared with Redis; how far the walk came is about to commit."""

    level = logging.DEBUG
    text = "committing a page"
    hints: int


@dataclass(frozen=True, slots=True)
class Reconciled(Event):
    """Waiting jobs that Redis did not know were published."""

    text = "published waiting jobs that Redis did not know"
    hints: int


@dataclass(frozen=True, slots=True)
class Pruned(Event):
    """Old finished jobs were deleted."""

    text = "deleted old finished jobs"
    jobs: int


@dataclass(frozen=True, slots=True)
class LoopBlocked(Event):
    """A job holds the event loop, so nothing else in this process moves."""

    level = logging.WARNING
    text = "the event loop is blocked; give long computations a queue and a worker of their own: exarq run -q cpu -c 1"
    task: str
    seconds: float


@dataclass(frozen=True, slots=True)
class LazyLoadsOverBudget(Event):
    """The sync code of an attempt loaded more attributes lazily than its definition allows."""

    level = logging.WARNING
    text = "more lazy loads than @job(lazy_loads=…) allows"
    job: UUID
    name: str
    allowed: int
    lazy_loads: int
    most: str
    instead: str


@dataclass(frozen=True, slots=True)
class TickCommitting(Event):
    """A tick was taken and its jobs are written; nothing is committed yet."""

    level = logging.DEBUG
    text = "committing a tick"
    schedule: str


@dataclass(frozen=True, slots=True)
class Ticked(Event):
    """A schedule's tick, the last of those that were due, and how many jobs they got.

    `skipped` had none, for an earlier tick's job had not ended.
    """

    text = "schedule ticked"
    schedule: str
    tick: str
    jobs: int
    skipped: int


@dataclass(frozen=True, slots=True)
class TickFailed(Event):
    """The job of a tick cannot be made in this worker; the tick stays due, and another may."""

    level = logging.WARNING
    text = "a schedule's tick stays due, for its job cannot be made here"
    schedule: str
    error: str


@dataclass(frozen=True, slots=True)
class ScheduleNameTaken(Event):
    """The schedule of a job's definition is not made: somebody has added another one of that name."""

    level = logging.WARNING
    text = "a schedule of this name was added by hand, so the one that the code declares does not tick"
    schedule: str


@dataclass(frozen=True, slots=True)
class SelfFenced(Event):
    """No beat could be made for a lease; the worker cancelled its own runs."""

    level = logging.ERROR
    text = "no heartbeat for a whole lease: cancelled all runs"
    worker: UUID
    runs: int


@dataclass(frozen=True, slots=True)
class WorkerRenewed(Event):
    """The worker's row was gone; it goes on under a new id."""

    level = logging.WARNING
    text = "this worker had been given up; it starts anew under a new id"
    old: UUID
    new: UUID


@dataclass(frozen=True, slots=True)
class ThreadsLeft(Event):
    """The process ends although threads that jobs have started still work; nobody can stop a thread."""

    level = logging.WARNING
    text = "ended although threads of jobs still work"
    threads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CancelNotTold(Event):
    """The workers were not told that somebody asked to cancel a job; each sees it with its next beat."""

    level = logging.WARNING
    text = "workers not told of a cancel request; they see it with the next beat"
    requests: int
    error: str


@dataclass(frozen=True, slots=True)
class ProcessesStarting(Event):
    """A parent starts its worker processes."""

    text = "starting worker processes"
    processes: int


@dataclass(frozen=True, slots=True)
class ProcessDied(Event):
    """A worker process ended that should run; `how` is a signal's name or an exit code, `restart_in` in seconds."""

    level = logging.WARNING
    text = "a worker process died"
    process: int
    pid: int
    how: str
    restart_in: float | None


@dataclass(frozen=True, slots=True)
class ProcessRefused(Event):
    """A process ended at its start by what is wrong with the code or the settings, and said so."""

    level = logging.WARNING
    text = "a worker process refused to start; the next change of the code starts it again"
    process: int


@dataclass(frozen=True, slots=True)
class ProcessRescued(Event):
    """What ran in a dead process was given back by its parent, without waiting for a lease."""

    level = logging.WARNING
    text = "gave back the jobs of a dead worker process"
    pid: int
    workers: tuple[UUID, ...]
    jobs: int
    blamed: int
    failed: int


@dataclass(frozen=True, slots=True)
class ProcessesStopping(Event):
    """The parent told its processes to stop."""

    text = "stopping all worker processes; a second signal gives back at once what runs"
    reason: str
    processes: int


@dataclass(frozen=True, slots=True)
class ProcessesStopped(Event):
    """The last process of a parent has ended."""

    text = "all worker processes stopped"


@dataclass(frozen=True, slots=True)
class HeartbeatFileFailed(Event):
    """The file that `exarq check` reads cannot be written; told once, the worker works all the same."""

    level = logging.WARNING
    text = "no heartbeat file, so `exarq check` finds no worker; set worker.heartbeat_folder to a writable folder"
    file: str
    error: str
