"""What is asked of the tables without changing them, and the names that people see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    DateTime,
    Float,
    Integer,
    Interval,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    case,
    cast,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    tuple_,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import selectinload

from worker.core.blame import SUSPECT_FROM
from worker.core.states import JobState
from worker.db.models import Installation, Job, ScheduleRow, Upkeep, Worker, constant, stands_in
from worker.db.notifications import NOBODY_HEARS
from worker.db.transitions import Held
from worker.db.turns import CLOCK, RELAY, WALK, Position


async def installation_id(connection: AsyncConnection) -> UUID:
    """The id that marks this database's hints."""
    return (await connection.execute(select(Installation.id))).scalar_one()


# ── for the claim ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands that a claim could not take; `wait` is negative when it is overdue."""

    state: JobState
    wait: timedelta
    suspect: bool


_STANDINGS = select(
    Job.id, Job.state, (Job.run_at - func.statement_timestamp()).cast(Interval), Job.crashes >= SUSPECT_FROM
).where(Job.id == any_(bindparam("ids", type_=ARRAY(Uuid))))


async def standings(connection: AsyncConnection, ids: Sequence[UUID]) -> dict[UUID, Standing]:
    """Where these jobs stand; an id without a row is left out."""
    rows = await connection.execute(_STANDINGS, {"ids": list(ids)})
    return {id_: Standing(JobState(state), wait, suspect) for id_, state, wait, suspect in rows}


_SOMETHING_DUE = (
    select(Job.id)
    .where(
        Job.state == constant(JobState.QUEUED),
        Job.run_at <= func.statement_timestamp(),
        Job.queue == any_(bindparam("queues", type_=ARRAY(Text))),
    )
    .order_by(Job.run_at)  # by the index: the few that wait may lie behind all of history
    .limit(1)
)


async def something_is_due(connection: AsyncConnection, queues: Sequence[str]) -> bool:
    """Whether a job of these queues could run now."""
    return (await connection.execute(_SOMETHING_DUE, {"queues": list(queues)})).first() is not None


# ── for the completion ──────────────────────────────────────────────────────────────────────────────────────────────

_LAST_WORD = (
    select(Job.state, Job.token).where(Job.id == bindparam("job_id", type_=Uuid)).with_for_update(key_share=True)
)


async def has_succeeded_with(connection: AsyncConnection, held: Held) -> bool:
    """Whether the job succeeded under this token; waits for a transaction that may still say so."""
    row = (await connection.execute(_LAST_WORD, {"job_id": held.job_id})).first()
    return row is not None and row.state == JobState.SUCCEEDED and row.token == held.token


_UNDER_TOKENS = select(Job.id, Job.token, Job.state).where(Job.id == any_(bindparam("ids", type_=ARRAY(Uuid))))


async def states_under(connection: AsyncConnection, held: Sequence[Held]) -> dict[Held, JobState]:
    """The state of each of these that is still, or was last, under its token; waits for nobody."""
    rows = await connection.execute(_UNDER_TOKENS, {"ids": [one.job_id for one in held]})
    found = {Held(id_, token): JobState(state) for id_, token, state in rows if token is not None}
    return {one: found[one] for one in held if one in found}


# ── for the heartbeat and the rescue ────────────────────────────────────────────────────────────────────────────────

_RUNNING_UNDER = select(Job.id, Job.token, Job.cancel_requested).where(
    Job.worker_id == bindparam("worker_id", type_=Uuid), Job.state == constant(JobState.RUNNING)
)


async def running_under(connection: AsyncConnection, worker_id: UUID) -> dict[Held, bool]:
    """The jobs that run under a worker's id, each with whether somebody asked to cancel it."""
    rows = await connection.execute(_RUNNING_UNDER, {"worker_id": worker_id})
    return {Held(id_, token): flagged for id_, token, flagged in rows if token is not None}


_NO_BEAT, _NO_STEP = cast(null(), BigInteger), cast(null(), Text)
_SOMETHING_WAITS = exists().where(
    Job.state == constant(JobState.QUEUED),
    Job.run_at <= func.statement_timestamp() + bindparam("horizon", type_=Interval),
)
_WORKERS = select(Worker.id, Worker.beat, _NO_STEP)
_UNDER_AN_ID = (
    select(Job.worker_id, _NO_BEAT, _NO_STEP)
    .where(Job.state == constant(JobState.RUNNING), Job.worker_id.is_not(None))
    .distinct()
)
_STEPS = select(cast(null(), Uuid), _NO_BEAT, Upkeep.step).where(Upkeep.due_at <= func.clock_timestamp())
_WORTH_A_WALK = or_(Upkeep.step != WALK, Upkeep.after_id.is_not(None), _SOMETHING_WAITS)
_CLOCK_AND_RELAY = (
    select(cast(null(), Uuid), _NO_BEAT, literal(CLOCK, Text)).where(
        exists().where(
            ScheduleRow.paused_at.is_(None),
            ScheduleRow.next_at <= func.statement_timestamp() + bindparam("soon", type_=Interval),
        )
    ),
    select(cast(null(), Uuid), _NO_BEAT, literal(RELAY, Text)).where(NOBODY_HEARS),
)
_SWEEP = union_all(_WORKERS, _UNDER_AN_ID, _STEPS.where(_WORTH_A_WALK), *_CLOCK_AND_RELAY)
_SWEEP_NO_JOBS = union_all(_WORKERS, _STEPS, *_CLOCK_AND_RELAY)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a sweep sees of all that workers share.

    Args:
        beats: the beat of every worker; None for an id that has running jobs and no row, where those were looked for.
        due: the steps of upkeep that are due and may find something to do.

    """

    beats: dict[UUID, int | None]
    due: frozenset[str]


async def sweep(connection: AsyncConnection, *, horizon: timedelta, soon: timedelta, looks: bool = True) -> Seen:
    """Look at the workers and at the steps, in one round trip; jobs that wait, and ticks, are looked for that far.

    Where a snapshot is held open for long, to look at jobs goes through all that has run since; who has no time for
    it leaves them out, and takes it that some wait.
    """
    if looks:
        found = await connection.execute(_SWEEP, {"horizon": horizon, "soon": soon})
    else:
        found = await connection.execute(_SWEEP_NO_JOBS, {"soon": soon})
    rows = found.all()
    known = {id_: beat for id_, beat, _ in rows if beat is not None}
    orphans = dict.fromkeys(id_ for id_, beat, _ in rows if id_ is not None and beat is None)
    return Seen({**orphans, **known}, frozenset(step for _, _, step in rows if step is not None))


# ── for the reconcile ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits and is due soon; `due_in` is in seconds and negative when it is overdue."""

    id: UUID
    name: str
    queue: str
    due_in: float
    enqueued_at: datetime
    run_at: datetime
    priority: int


_DUE_SOON = Job.run_at <= func.statement_timestamp() + bindparam("horizon", type_=Interval)
_A_WAITING = select(
    Job.id,
    Job.name,
    Job.queue,
    cast(func.extract("epoch", Job.run_at - func.statement_timestamp()), Float),
    Job.enqueued_at,
    Job.run_at,
    Job.priority,
)
_WAITING = (
    _A_WAITING.where(Job.state == constant(JobState.QUEUED), _DUE_SOON)
    .order_by(Job.run_at, Job.id)
    .limit(bindparam("limit", type_=Integer))
)
_WAITING_AFTER = _WAITING.where(
    tuple_(Job.run_at, Job.id)
    > tuple_(bindparam("after_run_at", type_=DateTime(timezone=True)), bindparam("after_id", type_=Uuid))
)
_WAITING_AMONG = _A_WAITING.where(
    Job.id == any_(bindparam("ids", type_=ARRAY(Uuid))), stands_in(JobState.QUEUED), _DUE_SOON
)
_COMING_DUE = _WAITING.where(Job.run_at > func.statement_timestamp() - bindparam("horizon", type_=Interval))


async def waiting_among(connection: AsyncConnection, ids: Sequence[UUID], *, horizon: timedelta) -> list[Waiting]:
    """Those of these jobs that wait and are due within `horizon`."""
    rows = await connection.execute(_WAITING_AMONG, {"ids": list(ids), "horizon": horizon})
    return [Waiting(*row) for row in rows]


async def coming_due(connection: AsyncConnection, around: timedelta, *, limit: int) -> list[Waiting]:
    """The waiting jobs that have come due no longer than `around` ago, or will no later, in that order."""
    rows = await connection.execute(_COMING_DUE, {"horizon": around, "limit": limit})
    return [Waiting(*row) for row in rows]


async def waiting(
    connection: AsyncConnection, *, after: Position | None, horizon: timedelta, limit: int
) -> list[Waiting]:
    """The next waiting jobs behind `after` that are due within `horizon`, in the order they are due."""
    parameters: dict[str, Any] = {"horizon": horizon, "limit": limit}
    if after is None:
        rows = await connection.execute(_WAITING, parameters)
    else:
        position = {"after_run_at": after.run_at, "after_id": after.job_id}
        rows = await connection.execute(_WAITING_AFTER, parameters | position)
    return [Waiting(*row) for row in rows]


# ── for people ──────────────────────────────────────────────────────────────────────────────────────────────────────

SHOWN_STATE: ColumnElement[Any] = case(
    (and_(Job.state == constant(JobState.QUEUED), or_(Job.failures > 0, Job.crashes > 0)), "retrying"),
    (and_(Job.state == constant(JobState.QUEUED), Job.run_at > func.statement_timestamp()), "scheduled"),
    else_=Job.state,
)
"""The state as people name it: a queued job is retrying after a failure or a crash, due or not; else scheduled if it is
due later."""

SHOWN_STATES = ("queued", "scheduled", "retrying", "running", "succeeded", "failed", "cancelled")


def stored_state(shown: str) -> JobState:
    """The state under which a job is stored that people see in this one."""
    return JobState.QUEUED if shown in ("scheduled", "retrying") else JobState(shown)


def is_shown_as(shown: str) -> ColumnElement[bool]:
    """Whether people see a job in this state; by the index of the stored one."""
    return and_(Job.state == constant(stored_state(shown)), SHOWN_STATE.in_([shown]))


@dataclass(frozen=True, slots=True)
class JobLine:
    """One job in a list."""

    id: UUID
    name: str
    queue: str
    state: str
    attempt: int
    run_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None


async def jobs(
    session: AsyncSession, *, state: str | None, name: str | None, queue: str | None, limit: int
) -> list[JobLine]:
    """The newest jobs first, those that match."""
    query = select(
        Job.id, Job.name, Job.queue, SHOWN_STATE, Job.attempt, Job.run_at, Job.started_at, Job.finished_at, Job.error
    ).order_by(Job.id.desc())
    if state is not None:
        query = query.where(is_shown_as(state))
    if name is not None:
        query = query.where(Job.name == name)
    if queue is not None:
        query = query.where(Job.queue == queue)
    return [JobLine(*row) for row in await session.execute(query.limit(limit))]


async def counts(session: AsyncSession) -> dict[str, int]:
    """How many jobs are in each state, as people name it."""
    found = await session.execute(select(SHOWN_STATE, func.count()).group_by(SHOWN_STATE))
    return dict(found.all())


async def job(session: AsyncSession, job_id: UUID) -> tuple[Job, str] | None:
    """A job with its attempts, and its state as people name it; None when there is none."""
    query = select(Job, SHOWN_STATE).where(Job.id == job_id).options(selectinload(Job.attempts))
    row = (await session.execute(query)).first()
    return None if row is None else (row[0], row[1])
