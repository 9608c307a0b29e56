"""A worker's parts on a test's session or client, and one attempt with them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from worker.broker.payloads import Payloads
from worker.client import Client
from worker.core.errors import LeaseLost
from worker.core.registry import Registry
from worker.db import reads
from worker.db.failures import schema_needed
from worker.db.ids import uuid7
from worker.db.kept import Kept
from worker.db.send import once
from worker.db.session import make_sessions
from worker.flow import complete
from worker.flow.awaited import Awaited
from worker.flow.flush import Flusher
from worker.flow.holdings import Holdings, Run
from worker.flow.mirror import Mirror
from worker.flow.progress import Reports
from worker.flow.publish import Publisher
from worker.flow.run import run as run_attempt
from worker.flow.work import Counts, Identity, Work
from worker.observe import events
from worker.observe.events import AttemptEnded, Event
from worker.settings import load_settings
from worker.testing.borrow import borrow
from worker.testing.sessions import NoHints


@dataclass(frozen=True, slots=True)
class Ended:
    """How one attempt ended.

    Args:
        job_id: the job's id.
        name: the name of its definition.
        attempt: the number of this run of the job, from 1.
        outcome: "succeeded", "retried", "failed", "cancelled", "snoozed" or "released".
        error: what the job raised; None when it succeeded.

    """

    job_id: UUID
    name: str
    attempt: int
    outcome: str
    error: BaseException | None


@asynccontextmanager
async def open_work(
    where: AsyncSession | Client, registry: Registry, context: Mapping[str, Any]
) -> AsyncIterator[Work]:
    """The worker's parts while the block lasts: inside the session's transaction, or on the client's engine."""
    if isinstance(where, Client):
        async with _work(where.engine, where.publisher, registry, context) as work:
            yield work
        return
    await where.flush()
    async with _work(await borrow(where), NoHints(), registry, context) as work:
        try:
            yield work
        finally:
            await _read_anew(where)


@asynccontextmanager
async def _work(
    engine: AsyncEngine, publisher: Publisher, registry: Registry, context: Mapping[str, Any]
) -> AsyncIterator[Work]:
    async def reject(run: Run, error: Exception) -> None:
        await complete.reject(work, run, error)

    async def installation(connection: AsyncConnection) -> UUID:
        with schema_needed():
            return await reads.installation_id(connection)

    sessions = make_sessions(engine, publisher.info)
    work = Work(
        settings=load_settings(),
        registry=registry,
        identity=Identity(uuid7()),
        installation=await once(engine, installation),
        jobs_engine=engine,
        sessions=sessions,
        processor=engine,
        claims=Kept(engine, lambda: ""),
        publisher=publisher,
        holdings=Holdings(),
        flusher=Flusher(
            engine,
            stored=lambda run: complete.succeeded(work, run),
            lost=lambda run: complete.lease_lost(work, run),
            rejected=reject,
        ),
        awaited=Awaited(publisher.publish),
        mirror=Mirror(None, engine, Payloads(), timedelta(0), publisher.publish),
        reports=Reports(None),  # the engine's one connection is in the job's transaction
        counts=Counts(),
        context={"engine": engine, "sessions": sessions, **context},
    )
    try:
        yield work
    finally:
        await work.flusher.close()


async def attempt(work: Work, run: Run) -> Ended:
    """Run one claimed attempt to its end, stored."""
    with _hearing(run) as heard:
        run.task = asyncio.create_task(run_attempt(work, run), name=f"exarq {run.claimed.name}")
        await run.task
        await work.flusher.drain()
    if not heard:
        raise LeaseLost(f"{run.claimed.name} was no longer held when it ended; did something delete or cancel its row?")
    return heard[0]


def raise_failure(ended: Ended) -> None:
    """Raise what the job raised."""
    __tracebackhide__ = True
    assert ended.error is not None
    ended.error.add_note(f"{ended.name}, attempt {ended.attempt}: {ended.outcome}")
    raise ended.error


@contextmanager
def _hearing(run: Run) -> Iterator[list[Ended]]:
    heard: list[Ended] = []

    def hear(event: Event) -> None:
        if isinstance(event, AttemptEnded) and event.job == run.claimed.held.job_id:
            # How an attempt ended is told while what it raised is being handled.
            error = None if event.outcome == "succeeded" else sys.exception()
            heard.append(Ended(event.job, event.name, event.attempt, str(event.outcome), error))

    stop = events.listen(hear)
    try:
        yield heard
    finally:
        stop()


async def _read_anew(session: AsyncSession) -> None:
    """Read again what the session has loaded, for jobs have written with sessions of their own."""
    for loaded in list(session.identity_map.values()):
        state = inspect(loaded)
        names = [*state.mapper.column_attrs.keys(), *state.mapper.relationships.keys()]
        with suppress(InvalidRequestError):  # a job has deleted it
            await session.refresh(loaded, [name for name in names if name in state.dict])
