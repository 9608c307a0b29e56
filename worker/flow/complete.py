"""Complete: store how an attempt ended; a success commits together with what the job wrote."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Final, assert_never
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.broker.hints import Hint, due_at, ms_of
from worker.core.errors import DatabaseUnreachable
from worker.core.outcome import (
    Cancelled,
    ErrorText,
    Failed,
    Outcome,
    Released,
    RetryAfter,
    Snoozed,
    Succeeded,
    outcome_of,
)
from worker.core.retry import RetryPolicy
from worker.core.states import FINAL, JobState
from worker.db import reads, transitions
from worker.db.failures import is_refusal
from worker.db.send import until_answered
from worker.db.transitions import Held, Moved
from worker.flow.after_commit import HORIZON
from worker.flow.attempt import Attempt
from worker.flow.holdings import Run
from worker.flow.work import Work
from worker.observe.events import AttemptEnded, CommitInDoubt, StaleWriteRefused, StepFailed, emit

# The job's timeout ended with its function; this is how long its flush, its completion and its COMMIT may take.
_COMPLETION_LIMIT: Final = timedelta(seconds=30)
_NOT_STORED: Final = (
    f"PostgreSQL did not store the success within {_COMPLETION_LIMIT.total_seconds():g} s; is the job's row held by an"
    " open transaction, as of somebody who cancels it? See pg_locks"
)


async def succeed(work: Work, run: Run, attempt: Attempt, result: str) -> None:
    """Running → succeeded: in the attempt's transaction, or with the next flush when it took no connection.

    Raises: `LeaseLost` when somebody else holds the job, and whatever keeps the transaction from committing; then
    nothing was written.
    """
    if not attempt.used:
        attempt.transaction.require_orderly()
        work.flusher.add(run, result)
        return
    held = run.claimed.held
    limit = asyncio.timeout(_COMPLETION_LIMIT.total_seconds())
    try:
        async with limit:
            committed = await attempt.commit_success(held, result, run.remarks)
    except BaseException as error:
        in_doubt = attempt.transaction.commit_sent and not is_refusal(error)
        if not in_doubt or not await _has_committed(work, attempt, held):
            if limit.expired():
                raise DatabaseUnreachable(_NOT_STORED) from error
            raise
        committed = True
    if committed:
        succeeded(work, run)
        work.publisher.publish(attempt.hints)
    else:
        work.flusher.add(run, result)


def succeeded(work: Work, run: Run) -> None:
    """The success is committed."""
    work.holdings.let_go(run.claimed.held)
    work.counts.succeeded += 1
    work.awaited.ended(run.claimed.held.job_id)
    work.mirror.moved(run.claimed.held.job_id)
    _tell(run, "succeeded", None)


async def _has_committed(work: Work, attempt: Attempt, held: Held) -> bool:
    """Whether a COMMIT whose answer was lost took place: ask the row, once its old transaction has surely ended."""
    pid = attempt.transaction.backend_pid
    await attempt.discard()

    async def ask(connection: AsyncConnection) -> bool:
        await connection.execute(_END_BACKEND, {"pid": pid, "name": work.identity.application_name})
        return await reads.has_succeeded_with(connection, held)

    committed = await until_answered(work.processor, ask)
    emit(CommitInDoubt(job=held.job_id, committed=committed))
    return committed


_END_BACKEND = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid AND application_name = :name"
)


async def end(work: Work, run: Run, outcome: Outcome) -> None:
    """Running → queued, failed or cancelled, as the outcome says; its own writes were rolled back before."""
    held = run.claimed.held
    try:
        moved = await until_answered(work.processor, partial(_move, run=run, outcome=outcome))
    except Exception as refusal:
        if isinstance(outcome, Failed):
            raise
        # PostgreSQL refuses what this outcome says, and a job that cannot end would run for ever.
        outcome = Failed(ErrorText.of(refusal))
        moved = await until_answered(work.processor, partial(_move, run=run, outcome=outcome))
    if moved is None:
        lease_lost(work, run)
        return
    work.holdings.let_go(held)
    error = _count(work, outcome)
    _tell(run, moved.ending, error)
    publish_moved(work, [moved])


async def _move(connection: AsyncConnection, *, run: Run, outcome: Outcome) -> Moved | None:
    held, remarks = run.claimed.held, run.remarks
    match outcome:
        case RetryAfter(delay, error, counts):
            return await transitions.retry(connection, held, error, wait=delay, counts=counts, remarks=remarks)
        case Snoozed(delay):
            return await transitions.snooze(connection, held, delay, remarks=remarks)
        case Cancelled(reason):
            return await transitions.cancel(connection, held, reason, remarks=remarks)
        case Failed(error):
            return await transitions.fail(connection, held, error, remarks=remarks)
        case Released(delay, reason):
            return await transitions.release(connection, held, reason, wait=delay, remarks=remarks)
        case Succeeded():
            raise AssertionError("a success is completed in its own transaction, by succeed()")
        case _:
            assert_never(outcome)


def lease_lost(work: Work, run: Run) -> None:
    """Somebody else holds the job; this attempt left no trace."""
    work.holdings.let_go(run.claimed.held)
    emit(StaleWriteRefused(job=run.claimed.held.job_id, name=run.claimed.name))


async def reject(work: Work, run: Run, error: Exception) -> None:
    """Running → as after any failure, for a result that the server refuses to store."""
    try:
        await end(work, run, outcome_of_error(work, run, error))
    except Exception as unexpected:  # give the row to the next beat
        work.holdings.let_go(run.claimed.held)
        emit(StepFailed(step=f"reject {run.claimed.name}", error=repr(unexpected)))


def outcome_of_error(work: Work, run: Run, error: BaseException) -> Outcome:
    """What follows from an error, by the definition's policy and what the job has behind it."""
    claimed, jobs = run.claimed, work.settings.jobs
    definition = work.registry.get(claimed.name)
    policy = RetryPolicy(
        max_attempts=definition.rules.max_attempts or jobs.max_attempts,
        first_wait=jobs.first_wait,
        longest_wait=jobs.longest_wait,
    )
    return outcome_of(error, policy, claimed.failures, random.random, transient=claimed.contended)


def hints_of(moved: Iterable[Moved], installation: UUID) -> list[Hint]:
    """The hints of those that wait again and are due soon."""
    return [
        Hint(
            job.job_id,
            job.name,
            job.queue,
            due_at(job.wait.total_seconds()),
            ms_of(job.enqueued_at),
            installation,
            job.priority,
        )
        for job in moved
        if job.state is JobState.QUEUED and job.wait <= HORIZON
    ]


def publish_moved(work: Work, moved: Sequence[Moved]) -> None:
    """Publish those that wait again and are due soon, for reconcile does the others; tell who waits for the ended."""
    work.publisher.publish(hints_of(moved, work.installation))
    for job in moved:
        work.mirror.moved(job.job_id)
        if job.state in FINAL:
            work.awaited.ended(job.job_id)


def _count(work: Work, outcome: Outcome) -> str | None:
    match outcome:
        case RetryAfter(_, error, _):
            work.counts.retried += 1
            return f"{error.type}: {error.message}"
        case Failed(error):
            work.counts.failed += 1
            return f"{error.type}: {error.message}"
        case Released(_, reason):
            work.counts.released += 1
            return reason
        case Cancelled(reason):
            return reason
        case _:
            return None


def _tell(run: Run, outcome: str, error: str | None) -> None:
    claimed, blocked = run.claimed, run.remarks.blocked
    emit(
        AttemptEnded(
            job=claimed.held.job_id,
            name=claimed.name,
            attempt=claimed.attempt,
            outcome=outcome,
            seconds=time.monotonic() - run.started,
            error=error,
            blocked=None if blocked is None else blocked.total_seconds(),
        )
    )
