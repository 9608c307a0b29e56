"""An enqueue that says more than what, where and when: its priority, its deadline, its key. A pure model, as `model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal
from uuid import UUID

from tests.db.machine.model import Effect, Job, View, expired
from worker.core.states import FINAL, JobState

EXPIRED = "expired: no attempt may start after "


@dataclass(frozen=True)
class Asked:
    """One of the jobs of an enqueue; times are hours.

    Args:
        says: its arguments.
        expires: how long after it is due it may start; None: for ever.
        lasts: how long it has its key, and then until it is done; None: as `scope` says.

    """

    says: str
    queue: str
    wait: int
    priority: int
    expires: int | None
    key: str | None = None
    scope: Literal["until_started", "until_done"] = "until_done"
    lasts: int | None = None
    on_conflict: Literal["skip", "replace", "raise"] = "skip"


def enqueue(view: View, asked: Sequence[Asked], ids: Sequence[UUID]) -> Effect:
    """Nothing → queued for those whose keys are free, and for each other as it says; all of them or none."""
    jobs: dict[UUID, Job] = dict(view.jobs)
    changed: dict[UUID, Job | None] = {}
    answer: dict[int, tuple[str, UUID]] = {}
    looked_for: set[UUID | str] = {one.key for one in asked if one.key}
    refusals = []
    for number, one in sorted(enumerate(asked), key=lambda numbered: numbered[1].key or ""):
        holder = next((id_ for id_, job in jobs.items() if one.key == job.key and job.has_key), None)
        over = holder is not None and _over(view, jobs[holder], one)
        if holder and (over or _replaces(one, jobs[holder])):
            looked_for.add(holder)
        if holder is None or over:
            if holder:
                changed[holder] = _parted(view, jobs[holder])
            changed[ids[number]] = _placed(view, one)
            answer[number] = ("created", ids[number])
        elif one.on_conflict == "skip":
            answer[number] = ("exists", holder)
        elif _replaces(one, jobs[holder]):
            changed[holder] = _replaced(view, jobs[holder], one)
            answer[number] = ("replaced", holder)
        else:
            refusals.append(("taken", holder, jobs[holder].state))
    if refusals:
        return Effect(waits_for=frozenset(looked_for), answer=refusals[0])
    told = [answer[number] for number in range(len(asked))]
    return Effect(changed, frozenset(changed), told, waits_for=frozenset(looked_for))


def _replaces(one: Asked, job: Job) -> bool:
    return one.on_conflict == "replace" and job.never_started


def _over(view: View, job: Job, one: Asked) -> bool:
    """Whether the job has its key no longer once somebody wants it."""
    if job.state in FINAL:
        return job.until is not None and job.until <= view.now
    return job.state is JobState.QUEUED and expired(view, job) and not _replaces(one, job)


def _parted(view: View, job: Job) -> Job:
    if job.state in FINAL:
        return replace(job, until=None)
    return replace(job, until=None, state=JobState.CANCELLED, finished_at=view.now, error=EXPIRED)


def _placed(view: View, one: Asked) -> Job:
    due = view.now + one.wait
    job = Job(one.queue, due, due, says=one.says, priority=one.priority, expires=_deadline(due, one))
    if one.key is None:
        return job
    until = None if one.lasts is None else view.now + one.lasts
    return replace(job, key=one.key, scope=one.scope, until=until)


def _replaced(view: View, job: Job, one: Asked) -> Job:
    """The row keeps its queue, and what is said of its key."""
    due = view.now + one.wait
    deadline = _deadline(due, one)
    return replace(job, run_at=due, first_due_at=due, says=one.says, priority=one.priority, expires=deadline)


def _deadline(due: int, one: Asked) -> int | None:
    return None if one.expires is None else due + one.expires
