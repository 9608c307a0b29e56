"""Run: call the function with a session of its own; returned = committed, raised = rolled back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from worker.core.context import JobContext
from worker.core.errors import ExarqError, LeaseLost, UnknownJob
from worker.core.options import Rules
from worker.core.outcome import Cancelled, ErrorText, Failed, Outcome, Released
from worker.core.registry import Definition
from worker.db.isolation import isolation_of
from worker.flow import complete, lazy_loads, legacy
from worker.flow.attempt import Attempt
from worker.flow.holdings import Because, Run
from worker.flow.work import Work
from worker.observe.events import RunCancelled, emit

_SOONEST_ELSEWHERE: Final = timedelta(seconds=2)
_LATEST_ELSEWHERE: Final = timedelta(minutes=5)


class JobTimeout(ExarqError):
    """Raised for a function that ran longer than its definition allows."""


class _Interrupted(Exception):
    """The worker cancelled the function, and why stands on the run."""


async def run(work: Work, run: Run) -> None:
    """Run one claimed attempt; its writes and its success commit together or not at all."""
    if run.claimed.expired_at is not None:  # by PostgreSQL's clock, as it was claimed
        said = f"expired: no attempt may start after {run.claimed.expired_at}"
        await complete.end(work, run, Cancelled(said))
        return
    work.mirror.began(run)
    try:
        definition = work.registry.get(run.claimed.name)
        attempt = Attempt(work, run.claimed.held, definition.rules, run.task)
        try:
            result = await _call(work, run, attempt, definition)
            await complete.succeed(work, run, attempt, definition.signature.encode_result(result))
        finally:
            await attempt.close()
    except LeaseLost:
        complete.lease_lost(work, run)
    except _Interrupted:
        await _end_interrupted(work, run)
    except GeneratorExit:
        raise
    except BaseException as error:  # also a job's sys.exit() and KeyboardInterrupt, which would end the worker
        await complete.end(work, run, _outcome(work, run, error))


async def _call(work: Work, run: Run, attempt: Attempt, definition: Definition[Any, ..., Any]) -> Any:
    """Call the function; its timeout and its cancellation reach no further than to its return."""
    claimed = run.claimed
    function = partial(definition.fn, **definition.signature.call_arguments(claimed.args))
    limit = (definition.rules.timeout or work.settings.jobs.timeout).total_seconds()
    run.in_function = True
    # A timer and the run's own cancellation are all that asyncio.timeout() is, at a third of its price.
    timer = asyncio.get_running_loop().call_later(limit, run.time_out)
    try:
        match definition.signature.takes:
            case "session":
                return await function(attempt.session())
            case "context":
                return await function(_context(work, run, definition.rules, attempt.session))
            case "sync session":
                context = _context(work, run, definition.rules, legacy.no_async_session)
                return await legacy.call(run, attempt.session(), context, function)
    except asyncio.CancelledError as error:
        match run.cancelled_because:
            case None:
                raise  # the job's own doing, which fails it
            case Because.TIMED_OUT:
                raise JobTimeout(f"{claimed.name} ran longer than its timeout of {limit:g} s") from error
            case _:
                raise _Interrupted from error
    finally:
        timer.cancel()
        run.in_function = False
        if loads := attempt.transaction.lazy_loads:
            lazy_loads.remark(run, definition.rules.lazy_loads, loads)
        while run.cancelled_because is not None and run.task is not None and run.task.cancelling():
            run.task.uncancel()  # also where the job swallowed it: what follows has limits of its own


def _context(work: Work, run: Run, rules: Rules, open_session: Callable[[], AsyncSession]) -> JobContext:
    claimed = run.claimed
    return JobContext(
        job_id=claimed.held.job_id,
        name=claimed.name,
        attempt=claimed.attempt,
        enqueued_at=claimed.enqueued_at,
        open_session=open_session,
        resources=work.context,
        report=lambda said: work.reports.report(run, isolation_of(work.jobs_engine.sync_engine, rules.isolation), said),
    )


def _outcome(work: Work, run: Run, error: BaseException) -> Outcome:
    if isinstance(error, UnknownJob) and run.claimed.name not in work.registry:
        return _outcome_of_unknown(work, run, error)
    try:
        return complete.outcome_of_error(work, run, error)
    except Exception as fault:  # a job's exceptions are anybody's code, and every job must be able to end
        said = f"the job raised {type(error).__name__}, which cannot be read: {type(fault).__name__}"
        return complete.outcome_of_error(work, run, RuntimeError(said))


def _outcome_of_unknown(work: Work, run: Run, error: UnknownJob) -> Outcome:
    """In a rolling deploy another worker knows the function: leave it the job, for a day at the most."""
    overdue = run.claimed.overdue
    if overdue > work.settings.jobs.unknown_job_limit:
        return Failed(ErrorText.of(error))
    return Released(min(max(overdue / 4, _SOONEST_ELSEWHERE), _LATEST_ELSEWHERE), str(error))


async def _end_interrupted(work: Work, run: Run) -> None:
    because = run.cancelled_because
    emit(RunCancelled(job=run.claimed.held.job_id, name=run.claimed.name, reason=str(because)))
    match because:
        case Because.LEASE_LOST:
            complete.lease_lost(work, run)
        case Because.CANCEL_REQUESTED:
            await complete.end(work, run, Cancelled(because))
        case _:
            await complete.end(work, run, Released(timedelta(0), str(because)))
