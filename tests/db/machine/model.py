"""The life of jobs as a pure model: what each move promises, without SQL, without locks and without a clock.

Time is in whole hours. A move is a function from the jobs as they are to its `Effect`; nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias
from uuid import UUID

from worker.core.blame import SUSPECT_FROM
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

    def is_held_by(self, token: UUID) -> bool:
        """Whether this token may write the job."""
        return self.state is JobState.RUNNING and self.token == token


Jobs: TypeAlias = Mapping[UUID, Job]


@dataclass(frozen=True)
class Effect:
    """What a move does: the jobs it changes (None: gone), the rows it locks, what it answers, whom it rescues."""

    changed: Mapping[UUID, Job | None] = field(default_factory=dict)
    locks: frozenset[UUID] = frozenset()
    answer: Any = None
    rescued: UUID | None = None
    worker_is_gone: bool = False


@dataclass(frozen=True)
class View:
    """The jobs as a statement sees them at one hour.

    Args:
        now: the hour.
        jobs: what is committed.
        locked: the rows that another transaction holds: a claim, a rescue and a prune pass them by.
        by_due: the ids in the order of `run_at`, as the rows have it: within an hour only they know.
        by_finish: the ids in the order of `finished_at`, likewise.
        workers: the rows of workers, each with whether it has announced its stop.
        in_rescue: the worker that another transaction is rescuing.

    """

    now: int
    jobs: Jobs
    locked: Collection[UUID]
    by_due: Sequence[UUID]
    by_finish: Sequence[UUID]
    workers: Mapping[UUID, bool]
    in_rescue: UUID | None

    def is_due(self, job_id: UUID) -> bool:
        """Whether the job waits and its time has come."""
        job = self.jobs.get(job_id)
        return job is not None and job.state is JobState.QUEUED and job.run_at <= self.now


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
    """The longest due of these queues; suspects are looked at only where one may be taken."""
    due = [
        job_id
        for job_id in view.by_due
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
        )
        for job_id in due
        if job_id not in refused
    }
    answer = {(job_id, job.attempt, job.failures, job.crashes) for job_id, job in taken.items()}
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
    return replace(
        job,
        state=state,
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


# ── people, and what runs on a clock ────────────────────────────────────────────────────────────────────────────────


def request_cancel(view: View, job_id: UUID, reason: str) -> Effect:
    """What waits is cancelled, what runs is flagged, what is final stays; how it stood is the answer."""
    job = view.jobs.get(job_id)
    if job is None:
        return Effect()
    effect = Effect({}, frozenset({job_id}), (job.state, job.worker))
    if job.state is JobState.QUEUED:
        ended = replace(job, state=JobState.CANCELLED, cancel_requested=True, finished_at=view.now, error=reason)
        return replace(effect, changed={job_id: ended})
    if job.state is JobState.RUNNING:
        return replace(effect, changed={job_id: replace(job, cancel_requested=True)})
    return effect


def retry_by_hand(view: View, job_id: UUID) -> Effect:
    """What has ended waits again as if it had never run; how it stood is the answer, and whether it was moved."""
    job = view.jobs.get(job_id)
    if job is None:
        return Effect()
    moved = _by_hand(view, [job_id], list(FINAL))
    return Effect(
        {one: _as_new(view, view.jobs[one]) for one in moved}, frozenset({job_id}), (job.state, job_id in moved)
    )


def retry_many(view: View, ids: Collection[UUID], states: Collection[JobState]) -> Effect:
    """The same of those in these states that nobody locks; the answer tells of each that was not passed by."""
    moved, free = _by_hand(view, ids, states), _free(view, ids)
    answer = {(one, view.jobs[one].state, one in moved) for one in free}
    return Effect({one: _as_new(view, view.jobs[one]) for one in moved}, free, answer)


def delete_many(view: View, ids: Collection[UUID], states: Collection[JobState]) -> Effect:
    """Those that have ended in these states are gone; the answer as of a retry."""
    moved, free = _by_hand(view, ids, states), _free(view, ids)
    return Effect(dict.fromkeys(moved), free, {(one, view.jobs[one].state, one in moved) for one in free})


def request_cancel_many(view: View, ids: Collection[UUID], states: Collection[JobState], reason: str) -> Effect:
    """Those in these states, each as one alone; the answer tells of each that was not passed by."""
    free = _free(view, ids)
    asked = [request_cancel(view, one, reason).changed for one in free if view.jobs[one].state in states]
    changed = {job_id: job for one in asked for job_id, job in one.items()}
    return Effect(changed, free, {(one, view.jobs[one].state, view.jobs[one].state in states) for one in free})


def _free(view: View, ids: Collection[UUID]) -> frozenset[UUID]:
    return frozenset(ids) & frozenset(view.jobs) - frozenset(view.locked)


def _by_hand(view: View, ids: Collection[UUID], states: Collection[JobState]) -> set[UUID]:
    """Those that have ended so; a success stays for a minute while its worker may still ask for it."""
    return {
        one
        for one in ids
        if one in view.jobs
        and one not in view.locked
        and (job := view.jobs[one]).state in FINAL & set(states)
        and not (job.state is JobState.SUCCEEDED and job.finished_at == view.now and job.worker in view.workers)
    }


def _as_new(view: View, job: Job) -> Job:
    noted = job.noted
    if job.state is JobState.SUCCEEDED:
        noted = (*noted, Noted(job.attempt, job.token, job.worker, Ending.SUCCEEDED, None, None))
    return Job(job.queue, view.now, view.now, attempt=job.attempt, noted=noted)


def prune(view: View, state: JobState, keep: int, batch: int) -> Effect:
    """The oldest of those that ended so before `keep` hours; how many is the answer."""
    old = [
        job_id
        for job_id in view.by_finish
        if (job := view.jobs[job_id]).state is state
        and job.finished_at is not None
        and job.finished_at <= view.now - keep
        and job_id not in view.locked
    ][:batch]
    return Effect(dict.fromkeys(old), frozenset(old), len(old))


def waiting(view: View) -> set[tuple[str, UUID]]:
    """The jobs that Redis must know, each with its queue."""
    return {(job.queue, job_id) for job_id, job in view.jobs.items() if view.is_due(job_id)}


def running_under(view: View, worker: UUID) -> dict[Held, bool]:
    """What a beat finds in the rows: each job that runs there, and whether it is flagged."""
    return {
        Held(job_id, job.token): job.cancel_requested
        for job_id, job in view.jobs.items()
        if job.state is JobState.RUNNING and job.worker == worker and job.token is not None
    }
