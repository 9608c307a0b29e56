"""What people do to jobs they name: again, gone, not wanted any more. A pure model, as `model`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from uuid import UUID

from tests.db.machine.model import Effect, Job, Noted, View, expired
from worker.core.states import FINAL, Ending, JobState


def request_cancel(view: View, job_id: UUID, reason: str) -> Effect:
    """What waits is cancelled, what runs is flagged, what is final stays; how it stood is the answer."""
    job = view.jobs.get(job_id)
    if job is None:
        return Effect()
    effect = Effect({}, frozenset({job_id}), (job.state, job.worker))
    if job.state is JobState.QUEUED:
        ended = replace(
            job, state=JobState.CANCELLED, cancel_requested=True, finished_at=view.now, error=reason, until=None
        )
        return replace(effect, changed={job_id: ended})
    if job.state is JobState.RUNNING:
        return replace(effect, changed={job_id: replace(job, cancel_requested=True)})
    return effect


def retry_by_hand(view: View, job_id: UUID) -> Effect:
    """What has ended waits again as if it had never run, unless its key is taken; the answer as of a retry of many."""
    return _retry(view, [job_id], frozenset({job_id}), FINAL) if job_id in view.jobs else Effect()


def retry_many(view: View, ids: Collection[UUID], states: Collection[JobState]) -> Effect:
    """The same of those in these states that nobody locks; how each stood, whether it moved, whether its key is taken."""
    return _retry(view, ids, _free(view, ids), states)


def _retry(view: View, ids: Collection[UUID], free: frozenset[UUID], states: Collection[JobState]) -> Effect:
    freed = _freed_for(view, ids)
    effect = _as_new(replace(view, jobs={**view.jobs, **freed}), free, states)
    return replace(effect, changed={**freed, **effect.changed}, locks=effect.locks | freed.keys())


def _freed_for(view: View, ids: Collection[UUID]) -> dict[UUID, Job]:
    """Who has ended and only waits for its time to be over gives its key up to the others, if it is over."""
    return {
        job_id: replace(job, until=None)
        for job_id, job in view.jobs.items()
        if job.until is not None
        and job.until <= view.now
        and job.state in FINAL
        and job_id not in view.locked
        and any(view.jobs[one].key == job.key for one in ids if one in view.jobs and one != job_id)
    }


def _as_new(view: View, free: frozenset[UUID], states: Collection[JobState]) -> Effect:
    moved: dict[UUID, Job | None] = {}
    refused, newer = set(), set()
    for one in sorted(free, reverse=True):  # of several with one key the newest gets it
        job, again, young = view.jobs[one], _again(view, view.jobs[one]), _young(view, view.jobs[one])
        if job.state not in FINAL & set(states):
            continue
        taken = any(other.key == job.key and other.has_key for id_, other in view.jobs.items() if id_ != one)
        if again.has_key and (taken or (job.key, young) in newer):
            refused.add(one)
        elif not young:
            moved[one] = again
        newer.add((job.key, young))
    answer = {(one, view.jobs[one].state, one in moved, one in refused) for one in free}
    return Effect(moved, free, knows=frozenset(key for one in free if (key := view.jobs[one].key)), answer=answer)


def _again(view: View, job: Job) -> Job:
    noted = job.noted
    if job.state is JobState.SUCCEEDED:
        noted = (*noted, Noted(job.attempt, job.token, job.worker, Ending.SUCCEEDED, None, None))
    return replace(
        Job(job.queue, view.now, view.now, attempt=job.attempt, noted=noted),
        **{name: getattr(job, name) for name in ("says", "priority", "key", "scope", "until", "started_at")},
        expires=None if expired(view, job) else job.expires,
    )


def delete_many(view: View, ids: Collection[UUID], states: Collection[JobState]) -> Effect:
    """Those that have ended in these states are gone; how each stood, and whether it is gone."""
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
    """Those that have ended so."""
    return {
        one
        for one in _free(view, ids)
        if (job := view.jobs[one]).state in FINAL & set(states) and not _young(view, job)
    }


def _young(view: View, job: Job) -> bool:
    """A success stays for a minute while its worker may still ask for it."""
    return job.state is JobState.SUCCEEDED and job.finished_at == view.now and job.worker in view.workers
