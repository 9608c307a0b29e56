"""The life of jobs as a pure model: what each move promises, without SQL, without locks and without a clock.

Time is in whole hours. A move is a function from the jobs as they are to its `Effect`; nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias
from uuid import UUID

from worker.core.blame import SUSPECT_FROM
from worker.core.priority import DEFAULT_PRIORITY
from worker.core.states import FINAL, Ending, JobState
from worker.db.transitions import Held

MAX_CRASHES = 3


@dataclass(frozen=True)
class Noted:
    """One attempt that did not succeed."""

    number: int
    token: UUID | None
    worker: UUID | None
    ending: str
    error: str | None
    traceback: str | None


@dataclass(frozen=True)
class Job:
    """One job: all that its row and the rows of its attempts must say."""

    queue: str
    run_at: int
    first_due_at: int
    state: JobState = JobState.QUEUED
    says: str | None = None
    priority: int = DEFAULT_PRIORITY
    expires: int | None = None
    key: str | None = None
    scope: str | None = None
    until: int | None = None
    started_at: int | None = None
    attempt: int = 0
    failures: int = 0
    crashes: int = 0
    cancel_requested: bool = False
    token: UUID | None = None
    worker: UUID | None = None
    finished_at: int | None = None
    result: Any = None
    error: str | None = None
    noted: tuple[Noted, ...] = ()

    @property
    def suspect(self) -> bool:
        """Whether it has crashed so often that it runs without another such job beside it."""
        return self.crashes >= SUSPECT_FROM

    @property
    def never_started(self) -> bool:
        """Whether it waits for its first attempt, so that it can be replaced."""
        return self.state is JobState.QUEUED and self.attempt == 0

    @property
    def has_key(self) -> bool:
        """Whether no other job may have its key."""
        live = self.state in (JobState.QUEUED, JobState.RUNNING)
        lasts = self.until is not None or self.never_started or (self.scope == "until_done" and live)
        return self.key is not None and lasts

    def is_held_by(self, token: UUID) -> bool:
        """Whether this token may write the job."""
        return self.state is JobState.RUNNING and self.token == token


Jobs: TypeAlias = Mapping[UUID, Job]


@dataclass(frozen=True)
class Effect:
    """What a move does: the jobs it changes (None: gone), the rows it locks, what it answers, whom it rescues.

    Args:
        waits_for: the rows that it looks for besides those it locks in the end, and the keys that it tries to take.
        knows: the keys of which it has decided who has them before it comes to wait.

    """

    changed: Mapping[UUID, Job | None] = field(default_factory=dict)
    locks: frozenset[UUID] = frozenset()
    answer: Any = None
    rescued: UUID | None = None
    worker_is_gone: bool = False
    waits_for: frozenset[UUID | str] = frozenset()
    knows: frozenset[str] = frozenset()


@dataclass(frozen=True)
class View:
    """The jobs as a statement sees them at one hour.

    Args:
        now: the hour.
        jobs: what is committed.
        locked: the rows that another transaction holds: a claim, a rescue and a prune pass them by.
        by_rank: the ids in the order of `run_at` and priority, as the rows have it: within an hour only they know.
        by_finish: the ids in the order of `finished_at`, likewise.
        workers: the rows of workers, each with whether it has announced its stop.
        in_rescue: the worker that another transaction is rescuing.

    """

    now: int
    jobs: Jobs
    locked: Collection[UUID]
    by_rank: Sequence[UUID]
    by_finish: Sequence[UUID]
    workers: Mapping[UUID, bool]
    in_rescue: UUID | None

    def is_due(self, job_id: UUID) -> bool:
        """Whether the job waits and its time has come."""
        job = self.jobs.get(job_id)
        return job is not None and job.state is JobState.QUEUED and job.run_at <= self.now


def expired(view: View, job: Job) -> bool:
    """Whether no attempt of it may start any more."""
    return job.expires is not None and job.expires <= view.now


def enqueue(view: View, job_id: UUID, queue: str, hours: int) -> Effect:
    """Nothing → queued."""
    due = view.now + hours
    return Effect({job_id: Job(queue, due, due)}, frozenset({job_id}))


# ── queued → running ────────────────────────────────────────────────────────────────────────────────────────────────


def claim(view: View, ids: Iterable[UUID], token: UUID, worker: UUID, *, may_take_suspect: bool) -> Effect:
    """Those that are due and that nobody locks, and one suspect at the most."""
    due = sorted(job_id for job_id in set(ids) if view.is_due(job_id) and job_id not in view.locked)
    return _claimed(view, due, token, worker, may_take_suspect=may_take_suspect)


def scan(
    view: View, queues: Collection[str], room: int, token: UUID, worker: UUID, *, may_take_suspect: bool
) -> Effect:
    """The first by rank of these queues; suspects are looked at only where one may be taken."""
    due = [
        job_id
        for job_id in view.by_rank
        if view.is_due(job_id)
        and job_id not in view.locked
        and view.jobs[job_id].queue in queues
        and (may_take_suspect or view.jobs[job_id].crashes < 2)
    ]
    return _claimed(view, due[:room], token, worker, may_take_suspect=may_take_suspect)


def _claimed(view: View, due: Sequence[UUID], token: UUID, worker: UUID, *, may_take_suspect: bool) -> Effect:
    suspects = sorted(job_id for job_id in due if view.jobs[job_id].crashes >= 2)
    refused = suspects[1:] if may_take_suspect else suspects
    taken = {
        job_id: replace(
            view.jobs[job_id],
            state=JobState.RUNNING,
            token=token,
            worker=worker,
            attempt=view.jobs[job_id].attempt + 1,
            started_at=view.now,
        )
        for job_id in due
        if job_id not in refused
    }
    answer = {(job_id, job.attempt, job.failures, job.crashes, expired(view, job)) for job_id, job in taken.items()}
    return Effect(taken, frozenset(due), answer)


# ── running → succeeded ─────────────────────────────────────────────────────────────────────────────────────────────


def succeed(view: View, held: Collection[Held], result: Any, *, passes_by: bool = False) -> Effect:
    """Those that are held, maybe passing by those that another transaction locks; the ids of these are the answer."""
    done: dict[UUID, Job | None] = {
        job_id: replace(job, state=JobState.SUCCEEDED, result=result, finished_at=view.now, error=None)
        for job_id, job in _held(view, held, passes_by).items()
    }
    return Effect(done, frozenset(done), set(done))


def _held(view: View, held: Collection[Held], passes_by: bool) -> dict[UUID, Job]:
    return {
        one.job_id: view.jobs[one.job_id]
        for one in held
        if one.job_id in view.jobs
        and view.jobs[one.job_id].is_held_by(one.token)
        and not (passes_by and one.job_id in view.locked)
    }


# ── running → queued, failed, cancelled ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Leave:
    """How a running job leaves: where to, and what its attempt leaves behind."""

    state: JobState
    ending: Ending
    wait: int = 0
    failures: int = 0
    crashes: int = 0
    error: str | None = None
    traceback: str | None = None


def leave(view: View, held: Collection[Held], how: Leave, *, passes_by: bool = False) -> Effect:
    """Those that are held, maybe passing by those that another transaction locks, go where `how` says."""
    return _left(view, dict.fromkeys(_held(view, held, passes_by), how))


def _left(view: View, leaving: Mapping[UUID, Leave]) -> Effect:
    changed: dict[UUID, Job | None] = {job_id: _after(view, job_id, how) for job_id, how in leaving.items()}
    answer = {
        (job_id, job.state, leaving[job_id].ending, job.run_at - view.now if job.state is JobState.QUEUED else None)
        for job_id, job in changed.items()
        if job is not None
    }
    return Effect(changed, frozenset(changed), answer)


def _after(view: View, job_id: UUID, how: Leave) -> Job:
    job = view.jobs[job_id]
    flagged = how.state is JobState.QUEUED and job.cancel_requested
    state = JobState.CANCELLED if flagged else how.state
    too_late = job.expires is not None and job.started_at is not None and job.expires <= job.started_at
    return replace(
        job,
        state=state,
        until=None if too_late and state is JobState.CANCELLED else job.until,
        run_at=view.now + how.wait if state is JobState.QUEUED else job.run_at,
        finished_at=view.now if state in FINAL else None,
        failures=job.failures + how.failures,
        crashes=job.crashes + how.crashes,
        error=job.error if how.error is None else how.error,
        noted=(*job.noted, Noted(job.attempt, job.token, job.worker, how.ending, how.error, how.traceback)),
    )


# ── the worker stopped beating ──────────────────────────────────────────────────────────────────────────────────────


def rescue(view: View, dead: UUID, reason: str) -> Effect:
    """All that run there: a crash is blamed on all of them, unless the worker had announced its stop."""
    if view.in_rescue == dead:
        return Effect()
    there = {job_id for job_id, job in view.jobs.items() if job.state is JobState.RUNNING and job.worker == dead}
    free = there - set(view.locked)
    blamed = not view.workers.get(dead, False)
    effect = _left(view, {job_id: _rescued(view.jobs[job_id], blamed, reason) for job_id in free})
    return replace(effect, rescued=dead, worker_is_gone=there == free)


def _rescued(job: Job, blamed: bool, reason: str) -> Leave:
    if not blamed:
        return Leave(JobState.QUEUED, Ending.RELEASED, error=reason)
    last = job.crashes + 1 >= MAX_CRASHES
    return Leave(JobState.FAILED if last else JobState.QUEUED, Ending.CRASHED, crashes=1, error=reason)


# ── what runs on a clock ─────────────────────────────────────────────────────────────────────────────────────────────────


def prune(view: View, state: JobState, keep: int, batch: int) -> Effect:
    """The oldest of those that ended so before `keep` hours; how many is the answer."""
    old = [
        job_id
        for job_id in view.by_finish
        if (job := view.jobs[job_id]).state is state
        and job.finished_at is not None
        and job.finished_at <= view.now - keep
        and (job.until is None or job.until <= view.now)
        and job_id not in view.locked
    ][:batch]
    return Effect(dict.fromkeys(old), frozenset(old), len(old))


def waiting(view: View) -> set[tuple[str, int, UUID]]:
    """The jobs that Redis must know, each with its queue and priority."""
    return {(job.queue, job.priority, job_id) for job_id, job in view.jobs.items() if view.is_due(job_id)}


def running_under(view: View, worker: UUID) -> dict[Held, bool]:
    """What a beat finds in the rows: each job that runs there, and whether it is flagged."""
    return {
        Held(job_id, job.token): job.cancel_requested
        for job_id, job in view.jobs.items()
        if job.state is JobState.RUNNING and job.worker == worker and job.token is not None
    }
