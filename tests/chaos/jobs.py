"""The job mix: each effect is a row written through the job's session, and a line in a file outside the database."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tests.chaos.evidence import Evidence
from worker.core.context import JobContext, current_job
from worker.core.outcome import Cancel, Snooze
from worker.flow.job import job
from worker.observe.events import Event, emit

Result = dict[str, Any]
PREFIX: Final = "chaos."
POISONED: Final = 9
"""The exit code of a process that ran the poison job."""


@dataclass(frozen=True)
class Kind:
    """What the checker expects of a job's end; where commits are its own, effects may be there before it."""

    parts: int
    ends: str = "succeeded"
    own: bool = False


KINDS: Final[dict[str, Kind]] = {
    "noop": Kind(0),
    "one": Kind(1),
    "several": Kind(3),
    "commits": Kind(2),
    "undoes": Kind(2),
    "legacy_commits": Kind(2),
    "legacy_goes_on": Kind(2),
    "slow": Kind(2),
    "late": Kind(1),
    "naps": Kind(0),
    "queries": Kind(1),
    "flaky": Kind(1),
    "snoozes": Kind(1),
    "reads": Kind(0),
    "isolated": Kind(1),
    "steps": Kind(4, own=True),
    "blocks": Kind(1),
    "fails": Kind(0, "failed"),
    "gives_up": Kind(0, "cancelled"),
    "shares": Kind(0, "failed"),
    "poison": Kind(0, "failed"),
    "too_late": Kind(0, "cancelled"),
    "ticks": Kind(1),
    "plain": Kind(1),
}

_EFFECT: Final = text("INSERT INTO effect VALUES (:job, :part, :attempt, :child)")

evidence: Evidence | None = None
"""Where this process notes what its jobs do; set by the worker's main function."""


@dataclass(frozen=True, slots=True)
class EffectWritten(Event):
    """A job has written through its session, and nothing is committed yet."""

    text = "effect written"
    job: UUID


@job(name="chaos.noop")
async def noop(ctx: JobContext) -> Result:
    """Do nothing, with no connection."""
    return _began(ctx)


@job(name="chaos.one")
async def one(ctx: JobContext) -> Result:
    """Write one row."""
    result = _began(ctx)
    await _effect(ctx, 0)
    return result


@job(name="chaos.several")
async def several(ctx: JobContext) -> Result:
    """Write several rows and enqueue a follow-up."""
    result = _began(ctx)
    for part in (0, 1):
        await _effect(ctx, part)
    child = await one.enqueue(ctx.session)
    await _effect(ctx, 2, child=child.id)
    return result


@job(name="chaos.commits")
async def commits(ctx: JobContext) -> Result:
    """Commit in the middle and at the end, as code does that was not written for a job processor."""
    result = _began(ctx)
    for part in (0, 1):
        await _effect(ctx, part)
        await ctx.session.commit()
    return result


@job(name="chaos.undoes")
async def undoes(ctx: JobContext) -> Result:
    """Keep one part, roll one back by a savepoint and one by the session, keep another."""
    result = _began(ctx)
    await _effect(ctx, 0)
    await ctx.session.commit()
    savepoint = await ctx.session.begin_nested()
    await _effect(ctx, 8, child=(await noop.enqueue(ctx.session)).id)
    await savepoint.rollback()
    await _effect(ctx, 9, child=(await noop.enqueue(ctx.session)).id)
    await ctx.session.rollback()
    await _effect(ctx, 1)
    return result


@job(name="chaos.legacy_commits")
def legacy_commits(session: Session) -> Result:
    """Commit in the middle and at the end, in sync code that keeps the loop for a moment in between."""
    ctx = _myself()
    result = _began(ctx)
    for part in (0, 1):
        _legacy_effect(session, ctx, part)
        time.sleep(0.002)
        session.commit()
    return result


@job(name="chaos.legacy_goes_on")
def legacy_goes_on(session: Session) -> Result:
    """Catch an IntegrityError, roll back to what was committed, go on."""
    ctx = _myself()
    result = _began(ctx)
    _legacy_effect(session, ctx, 0)
    session.commit()
    try:
        _legacy_effect(session, ctx, 9)
        _legacy_effect(session, ctx, None)
    except IntegrityError:
        session.rollback()
    _legacy_effect(session, ctx, 1)
    session.commit()
    return result


@job(name="chaos.slow")
async def slow(ctx: JobContext, seconds: float) -> Result:
    """Write, take a while with the transaction open, write again."""
    result = _began(ctx)
    await _effect(ctx, 0)
    await asyncio.sleep(seconds)
    await _effect(ctx, 1)
    return result


@job(name="chaos.late", timeout=3600)
async def late(ctx: JobContext, seconds: float) -> Result:
    """Take a while without a connection, as one that asks another service does, then write."""
    result = _began(ctx)
    await asyncio.sleep(seconds)
    await _effect(ctx, 0)
    return result


@job(name="chaos.naps")
async def naps(ctx: JobContext, seconds: float, again: float | None = None) -> Result:
    """Take a while, later attempts maybe another, and return, never with a connection."""
    result = _began(ctx)
    await asyncio.sleep(seconds if again is None or ctx.attempt == 1 else again)
    return result


@job(name="chaos.queries")
async def queries(ctx: JobContext, seconds: float) -> Result:
    """Write, then wait for a long query."""
    result = _began(ctx)
    await _effect(ctx, 0)
    await ctx.session.execute(text(f"SELECT pg_sleep({float(seconds)}) /* {ctx.job_id} */"))
    return result


@job(name="chaos.flaky", max_attempts=50)
async def flaky(ctx: JobContext, fails: int) -> Result:
    """Write and enqueue, then fail, as often as told; then write and succeed."""
    result = _began(ctx)
    if ctx.attempt <= fails:
        await _effect(ctx, 9, child=(await noop.enqueue(ctx.session)).id)
        raise RuntimeError(f"attempt {ctx.attempt} fails")
    await _effect(ctx, 0)
    return result


@job(name="chaos.snoozes")
async def snoozes(ctx: JobContext) -> Result:
    """Write, ask for more time, and do it all the next time."""
    result = _began(ctx)
    await _effect(ctx, 0)
    if ctx.attempt == 1:
        raise Snooze(0.2)
    return result


@job(name="chaos.reads", read_only=True, isolation="REPEATABLE READ")
async def reads(ctx: JobContext) -> Result:
    """Read, in a transaction that may do nothing else."""
    result = _began(ctx)
    await _is_placed(ctx)
    return result


@job(name="chaos.isolated", isolation="SERIALIZABLE", max_attempts=50)
async def isolated(ctx: JobContext) -> Result:
    """Read and write, as if alone."""
    result = _began(ctx)
    await _is_placed(ctx)
    await _effect(ctx, 0)
    return result


@job(name="chaos.steps", commits="own", max_attempts=50)
async def steps(ctx: JobContext, seconds: float) -> Result:
    """Commit each part for good, with a follow-up, from where an earlier attempt was cut off."""
    result = _began(ctx)
    done = text("SELECT count(*) FROM effect WHERE job_id = :job")
    begun = (await ctx.session.execute(done, {"job": ctx.job_id})).scalar_one()
    for part in range(begun, KINDS["steps"].parts):
        await _effect(ctx, part, child=(await noop.enqueue(ctx.session)).id)
        await ctx.session.commit()
        await asyncio.sleep(seconds / KINDS["steps"].parts)
    return result


@job(name="chaos.blocks")
async def blocks(ctx: JobContext, how: str, seconds: float) -> Result:
    """Write, then hold the event loop: asleep, in pure Python, or in C code that keeps the GIL."""
    result = _began(ctx)
    await _effect(ctx, 0)
    if ctx.attempt == 1:
        BLOCK[how](seconds)
    return result


@job(name="chaos.fails", max_attempts=2)
async def fails(ctx: JobContext) -> Result:
    """Write and fail, until there are no more attempts."""
    _began(ctx)
    await _effect(ctx, 0)
    raise RuntimeError("fails every time")


@job(name="chaos.gives_up")
async def gives_up(ctx: JobContext) -> Result:
    """Write, then end as cancelled."""
    _began(ctx)
    await _effect(ctx, 0)
    raise Cancel("not wanted any more")


@job(name="chaos.shares", max_attempts=2)
async def shares(ctx: JobContext) -> Result:
    """Write from a task of its own with the session that serves the job's task alone, and take no notice."""
    result = _began(ctx)
    await _effect(ctx, 0)
    await asyncio.gather(_effect(ctx, 1), return_exceptions=True)
    return result


@job(name="chaos.too_late", expires=timedelta(microseconds=1))
async def too_late(ctx: JobContext) -> Result:
    """Never run: no claim is so quick."""
    return _began(ctx)


@job(name="chaos.ticks", every=1, catch_up="all")
async def ticks(ctx: JobContext) -> Result:
    """Write one row, each second, by the clock."""
    result = _began(ctx)
    await _effect(ctx, 0)
    return result


@job(name="chaos.plain")
async def plain(ctx: JobContext, mark: str) -> Result:
    """Write one row, enqueued by plain ARQ code; the mark tells which enqueue it was."""
    result = _began(ctx)
    await _effect(ctx, 0)
    return result


@job(name="chaos.poison")
async def poison(ctx: JobContext) -> Result:
    """Write, then end the process."""
    _began(ctx)
    await _effect(ctx, 0)
    os._exit(POISONED)


def _began(ctx: JobContext) -> Result:
    if evidence is not None:
        evidence.note("began", job=ctx.job_id, attempt=ctx.attempt)
    return {"job": ctx.job_id, "attempt": ctx.attempt}


def _myself() -> JobContext:
    ctx = current_job()
    assert ctx is not None
    return ctx


async def _is_placed(ctx: JobContext) -> None:
    await ctx.session.execute(text("SELECT at FROM placed WHERE job_id = :job"), {"job": ctx.job_id})


async def _effect(ctx: JobContext, part: int, child: UUID | None = None) -> None:
    await ctx.session.execute(_EFFECT, {"job": ctx.job_id, "part": part, "attempt": ctx.attempt, "child": child})
    _wrote(ctx, part)


def _legacy_effect(session: Session, ctx: JobContext, part: int | None) -> None:
    session.execute(_EFFECT, {"job": ctx.job_id, "part": part, "attempt": ctx.attempt, "child": None})
    _wrote(ctx, part)


def _wrote(ctx: JobContext, part: int | None) -> None:
    if evidence is not None:
        evidence.note("effect", job=ctx.job_id, part=part, attempt=ctx.attempt)
    emit(EffectWritten(job=ctx.job_id))


# ── three ways to hold the event loop ────────────────────────────────────────────────────────────────────────────────


def _asleep(seconds: float) -> None:
    time.sleep(seconds)  # the GIL is free: other threads run


def _in_python(seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass


def _in_c(seconds: float) -> None:
    """One call into C that keeps the GIL: no other thread runs until it returns."""
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))


BLOCK: Final = {"asleep": _asleep, "python": _in_python, "c": _in_c}
