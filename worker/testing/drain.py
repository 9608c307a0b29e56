"""Drain: run in the test what waits, as a worker would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from worker.client import Client
from worker.core.errors import ExarqError
from worker.core.registry import Registry, default_registry, load_modules
from worker.core.states import Ending, JobState
from worker.db import transitions
from worker.db.ids import uuid7
from worker.db.models import Job, constant
from worker.db.send import once
from worker.db.transitions import ClaimedJob
from worker.flow.holdings import Run
from worker.flow.work import Work
from worker.settings import load_settings
from worker.testing.clock import FrozenClock, frozen_clock
from worker.testing.databases import NAME_PREFIX
from worker.testing.work import Ended, attempt, open_work, raise_failure

_FAILURES: Final = frozenset({Ending.RETRIED, Ending.FAILED, Ending.RELEASED})

_WAITS = Job.state == constant(JobState.QUEUED)
_QUEUES = select(Job.queue).where(_WAITS).distinct()
_NOW = select(func.clock_timestamp())
_NEXT_DUE = select(func.min(Job.run_at)).where(_WAITS)


class NotATestDatabase(ExarqError):
    """Raised when a client is to be drained whose database is none that was made for tests."""

    def __init__(self, name: str | None) -> None:
        super().__init__(
            f"drain(client) runs and commits whatever is due in the database {name!r}, which was not made for tests;"
            " use the fixture exarq_client, or say any_database=True"
        )


class NeverDrained(ExarqError):
    """Raised when a drain comes to no end, as with a job that enqueues or snoozes itself."""


async def drain(
    where: AsyncSession | Client,
    *,
    raises: bool = True,
    with_scheduled: bool = False,
    context: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
    limit: int = 1000,
    any_database: bool = False,
) -> list[Ended]:
    """Run what is due, and what that enqueues, one after the other until nothing is; returns how each attempt ended.

    The jobs are claimed, run and completed by the worker's own code, in this process and on this event loop. Given a
    session, all of it happens inside the session's transaction, whose isolation level stays, and what the session has
    loaded is read anew; given a client, the jobs that are committed run, each in a transaction of its own.

    PostgreSQL's clock stands still for all of it, as in `frozen_clock`: a retry that has to wait, however shortly, is
    not due in the same drain.

    Args:
        where: the session that enqueued, or a client.
        raises: raise what a job raised for a failure, once its attempt is stored; otherwise go on to the end.
        with_scheduled: run also what is due later (delays, retries, snoozes), the clock set forward to each.
        context: what `ctx[…]` gives the jobs.
        registry: the definitions; without one, those that are imported, and those of `jobs.modules`.
        limit: how many attempts are taken for a loop without end.
        any_database: drain a client's database although its name does not begin with exarq_test_.

    Raises:
        NotATestDatabase: the client's database was not made for tests.
        NeverDrained: after `limit` attempts something is still due.

    """
    __tracebackhide__ = True
    if isinstance(where, Client) and not any_database:
        _refuse_another(where)
    ended: list[Ended] = []
    async with open_work(where, registry or loaded_registry(), context or {}) as work:
        # PostgreSQL's own time: its clock may be ahead of ours, and what was just enqueued is due.
        now = await once(work.processor, lambda connection: connection.scalar(_NOW))
        with frozen_clock(now) as clock:
            while run := await (_claim_next(work, clock) if with_scheduled else _claim(work)):
                ended.append(await attempt(work, run))
                if raises and ended[-1].outcome in _FAILURES:
                    raise_failure(ended[-1])
                if len(ended) == limit:
                    raise NeverDrained(f"{limit} attempts were run; does {run.claimed.name} enqueue or snooze itself?")
    return ended


def loaded_registry() -> Registry:
    """The definitions that a worker of these settings has."""
    if modules := load_settings().jobs.modules:
        load_modules(modules)
    return default_registry


def _refuse_another(client: Client) -> None:
    name = client.engine.url.database
    if not (name or "").startswith(NAME_PREFIX):
        raise NotATestDatabase(name)


async def _claim_next(work: Work, clock: FrozenClock) -> Run | None:
    """The job that has been due for longest; if none is due, the clock is set to when one will be."""
    run = await _claim(work)
    if run is None:
        next_due = await once(work.processor, lambda connection: connection.scalar(_NEXT_DUE))
        if next_due is not None:
            clock.move_to(max(next_due, clock.now))
            run = await _claim(work)
    return run


async def _claim(work: Work) -> Run | None:
    token = uuid7()

    async def send(connection: AsyncConnection) -> list[ClaimedJob]:
        queues = (await connection.scalars(_QUEUES)).all()
        return await transitions.claim_by_scan(
            connection, queues, room=1, token=token, worker_id=work.identity.id, may_take_suspect=True
        )

    runs = work.holdings.claimed(token, await once(work.processor, send))
    return runs[0] if runs else None
