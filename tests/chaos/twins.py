"""Broken twins of Exarq: each leaves out one rule, and the checker must say which invariant that breaks.

They are installed in the processes under test only, never in the one that checks.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import os
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid4

import arq
from arq.connections import RedisSettings
from arq.constants import result_key_prefix
from sqlalchemy import Connection, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from tests.chaos import jobs, looks
from tests.chaos.stage import Stage
from worker.broker import scripts
from worker.broker.payloads import Payloads
from worker.core import blame
from worker.core.states import JobState
from worker.core.watch import Watch
from worker.db import ends, reads, schedules, transitions
from worker.db.ends import Stand
from worker.db.models import Job, Worker
from worker.db.send import once
from worker.db.session import AttemptSession
from worker.db.statements import enqueue as statements
from worker.db.transitions import Held
from worker.flow import claim, complete, enqueue, unique
from worker.flow.attempt import Attempt
from worker.flow.claim import Claimer
from worker.flow.holdings import Holdings, Run
from worker.flow.waiting import NET
from worker.upkeep import reconcile, schedule

Scenario = Callable[[Stage], Awaitable[None]]
AHEAD: Final = "CHAOS_SECONDS_AHEAD"


@dataclass(frozen=True, slots=True)
class Twin:
    """One rule left out."""

    breaks: str
    install: Callable[[], None]
    scenario: Scenario


# ── what brings it to light ──────────────────────────────────────────────────────────────────────────────────────────


async def work(stage: Stage) -> None:
    """Ordinary work, no fault."""
    stage.load(80)
    await asyncio.sleep(3)


async def a_kill(stage: Stage) -> None:
    """A worker dies in the middle of its work."""
    stage.load(80, {"one": 1, "several": 1})
    await asyncio.sleep(1)
    for _ in range(3):
        await stage.begun(*stage.workers)
        await asyncio.sleep(0.5)
        await stage.kill(stage.any_worker())
        stage.start_worker()
    await stage.begun(*stage.workers)


async def a_blocked_worker(stage: Stage) -> None:
    """A worker that is given up comes back with jobs that are about to end."""
    lease = stage.pace.lease
    naps, lates = [jobs.naps.call(1.5 * lease, 3 * lease)] * 10, [jobs.late.call(1.5 * lease)] * 10
    stage.excuse_all()  # whichever has it
    # Few and short: where the machine has no time for beats, they crash twice and are suspects, run one by one.
    ids = await stage.place(jobs.blocks.call("c", 3.5 * lease), *naps, *lates)
    await stage.until(lambda: looks.have_ended(stage.engine, ids), "they have ended", 40)


async def a_wait_through_kills(stage: Stage) -> None:
    """Somebody waits for every job; all workers die in the middle of theirs, and others run them again."""
    stage.load(60, {"naps:5": 1}, waits=1.0)
    await stage.until(lambda: looks.some_run(stage.engine, 20), "many run")
    await asyncio.sleep(2 * NET.total_seconds())  # each wait has looked since
    stage.load(0)
    for process in list(stage.workers):
        await stage.kill(process)
    await stage.begun(stage.start_worker(), stage.start_worker())


async def a_wipe(stage: Stage) -> None:
    """Redis loses everything while jobs wait."""
    await stage.place(*[jobs.noop.options(delay=2).call()] * 20)
    await stage.redis.flushall()
    stage.wiped()


async def suspects(stage: Stage) -> None:
    """Jobs that may only run one by one, so that most of those that are due cannot be claimed."""
    ids = await stage.place(*[jobs.slow.options(delay=1).call(0.7)] * 10)
    async with stage.engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET crashes = 2 WHERE id = ANY(:ids)"), {"ids": ids})
    _put(stage, "calm", True)
    await asyncio.sleep(6)
    _put(stage, "calm", False)


async def a_clock_ahead(stage: Stage) -> None:
    """A worker whose clock is five minutes ahead of all others'."""
    await stage.begun(stage.start_worker(chaos_seconds_ahead=300))
    await asyncio.sleep(3 * stage.pace.lease)


async def plain_arq(stage: Stage) -> None:
    """Plain ARQ code enqueues, and again under the same ids once it has the results."""
    pool = await arq.create_pool(RedisSettings.from_dsn(stage.redis_server.url))
    async with aclosing(pool):
        for _ in range(2):
            enqueued = []
            for number in range(10):
                mark = str(uuid4())
                await pool.delete(f"{result_key_prefix}again {number}")
                stage.evidence.note("plain intent", mark=mark)
                if (job := await pool.enqueue_job("chaos.plain", mark, _job_id=f"again {number}")) is not None:
                    stage.evidence.note("plain enqueued", mark=mark)
                    enqueued.append(job)
            results = (job.result(timeout=40, poll_delay=0.1) for job in enqueued)
            await asyncio.gather(*results, return_exceptions=True)


async def poison(stage: Stage) -> None:
    """Poison among jobs that take their time."""
    ids = await stage.place(*(call for _ in range(6) for call in (jobs.poison.call(), *[jobs.slow.call(2.0)] * 5)))
    known = text("SELECT count(*) FROM exarq.job WHERE id = ANY(:ids) AND state = 'failed'")

    async def failed() -> bool:
        async with stage.engine.connect() as connection:
            return int((await connection.execute(known, {"ids": ids})).scalar_one()) > 6

    await stage.until(failed, "more fail than are poison", 45)


async def no_index(stage: Stage) -> None:
    """Ordinary work, with nothing in PostgreSQL that keeps a key to one job."""
    async with stage.engine.begin() as connection:
        await connection.execute(text("DROP INDEX exarq.job_unique"))
        function = await connection.scalar(text("SELECT pg_get_functiondef('exarq.enqueue'::regproc)"))
        await connection.exec_driver_sql(re.sub(r"ON CONFLICT[^;]+DO NOTHING", "", function))
    stage.load(250, {"one": 1})
    await asyncio.sleep(3)


async def lost_claims(stage: Stage) -> None:
    """The answers to some claims are lost, and short jobs run on for whole leases."""
    stage.load(60, {"noop": 1, "one": 1})
    await asyncio.sleep(1)
    stage.to_postgres.lose_the_answer_to(lambda _: True, times=None, probability=0.02, rng=stage.rng)
    overdue = text(
        "SELECT count(*) FROM exarq.job WHERE state = 'running' AND started_at < now() - interval '3 seconds'"
    )

    async def forgotten() -> bool:
        async with stage.engine.connect() as connection:
            return bool((await connection.execute(overdue)).scalar_one())

    await stage.until(forgotten, "a claim was forgotten", 45)
    stage.to_postgres.restore()


# ── what is left out ─────────────────────────────────────────────────────────────────────────────────────────────────


def _put(place: Any, name: str, broken: Any) -> None:
    setattr(place, name, broken)


def _no_fence() -> None:
    """The completing UPDATE asks for whatever token the row has."""
    succeed_many, known = transitions.succeed_many, select(Job.id, Job.token)

    async def with_any_token(connection: AsyncConnection, results: Mapping[Held, str], _remarks: Any) -> set[Held]:
        tokens = dict((await connection.execute(known)).all())
        as_it_is = {Held(held.job_id, tokens[held.job_id] or held.token): text for held, text in results.items()}
        done = {held.job_id for held in await succeed_many(connection, as_it_is)}
        return {held for held in results if held.job_id in done}

    _put(transitions, "succeed_many", with_any_token)
    _put(Run, "cancel", lambda _self, _reason: False)  # nor does a beat or a timer come first, which is mere luck


def _one_token() -> None:
    """Every claim draws the same token."""
    token = UUID(int=1, version=4)
    claim.uuid4 = lambda: token  # type: ignore[attr-defined]


def _split_completion() -> None:
    """What the job wrote is committed first, its success in a transaction of its own."""
    importlib.import_module("worker.demo.broken")


def _no_commit() -> None:
    """The success is stored and what the job wrote is not."""

    async def not_there(_attempt: Attempt, _held: Held, _result: str, _remarks: Any) -> bool:
        return False

    _put(Attempt, "commit_success", not_there)


def _early_hints() -> None:
    """Hints go out at the enqueue, before the commit."""

    def at_once(_session: Any, _connection: Any, destination: Any, hints: Any) -> None:
        destination.publish(hints)

    _put(enqueue, "publish_after_commit", at_once)


def _rollback_commits() -> None:
    """What is rolled back is committed."""
    AsyncSession.rollback = AsyncSession.commit  # type: ignore[method-assign]


def _drops_unclaimed() -> None:
    """Every hint that could not be claimed leaves Redis."""

    async def drop(self: Claimer, _connection: Any, taken: Any, left: Any, _sent: float) -> None:
        self._leave_redis(taken, left)

    _put(Claimer, "_explain", drop)


def _never_drops() -> None:
    """No hint ever leaves Redis."""

    async def keep(*_: Any) -> int:
        return 0

    claim = scripts.claim

    async def claim_only(*args: Any, to_drop: object, **options: Any) -> Any:
        return await claim(*args, **options)

    _put(scripts, "drop", keep)
    _put(scripts, "claim", claim_only)


def _no_reconcile() -> None:
    """Nobody publishes what Redis does not know."""

    async def nothing(*_: Any) -> int:
        return 0

    _put(reconcile, "_publish_astray", nothing)


def _wall_clock() -> None:
    """A worker is dead whose last beat is older than a lease by the watcher's clock, whatever the watcher has seen."""
    ages: dict[UUID, float] = {}
    ahead = float(os.environ.get(AHEAD, 0))

    async def sweep(connection: AsyncConnection, **_: Any) -> reads.Seen:
        rows = (await connection.execute(select(Worker.id, Worker.beat, Worker.beat_at))).all()
        ages.update((id_, (datetime.now(UTC) - at).total_seconds() + ahead) for id_, _, at in rows)
        return reads.Seen({id_: beat for id_, beat, _ in rows}, frozenset({"reconcile", "prune"}))

    def look(self: Watch, seen: Mapping[UUID, int | None], _now: float) -> dict[UUID, int | None]:
        return {id_: beat for id_, beat in seen.items() if ages[id_] > self._lease}

    _put(reads, "sweep", sweep)
    _put(Watch, "look", look)


def _no_suspects() -> None:
    """Jobs that crashed run together again and again."""
    _put(blame, "SUSPECT_FROM", 1_000)
    statements = importlib.reload(importlib.import_module("worker.db.statements.claim"))
    for name in ("CLAIM_BY_ID", "CLAIM_BY_SCAN"):
        _put(transitions, name, getattr(statements, name))


def _forgets_claims() -> None:
    """A beat does not give back what was claimed by an answer that never came."""
    _put(Holdings, "unknown", lambda _self, _running: [])


def _gives_back_what_is_lost() -> None:
    """Who has lost a job puts it back into the queue, unasked."""
    kept: list[Any] = []
    lost = complete.lease_lost
    put_back = text("UPDATE exarq.job SET state = 'queued', result = NULL, finished_at = NULL WHERE id = :id")

    def lease_lost(work: Any, run: Any) -> None:
        lost(work, run)
        values = {"id": run.claimed.held.job_id}
        later = once(work.processor, lambda connection: connection.execute(put_back, values))
        kept.append(asyncio.get_running_loop().create_task(later))

    _put(complete, "lease_lost", lease_lost)


def _adopts_by_id() -> None:
    """Whatever plain ARQ code enqueues under an id is the job that had the id first."""
    read = Payloads.read

    def timeless(self: Payloads, payload: bytes) -> Any:
        return replace(read(self, payload), at=1)

    _put(Payloads, "read", timeless)


def _adopts_again() -> None:
    """For a while, each time that an id comes up it is another enqueue."""
    read, drawn = Payloads.read, itertools.count()

    def another(self: Payloads, payload: bytes) -> Any:
        number, found = next(drawn), read(self, payload)
        return replace(found, at=number) if number < 40 else found

    _put(Payloads, "read", another)


def _takes_any_key() -> None:
    """An enqueue writes its job whoever has the key."""
    _put(unique, "ENQUEUE_UNLESS_THERE", statements.ENQUEUE_FULL)


def _tells_what_runs() -> None:
    """Who waits for a result takes the word of a running attempt, before its COMMIT."""
    stands = ends.stands

    async def with_what_runs(connection: AsyncConnection, ids: Collection[UUID]) -> dict[UUID, Stand]:
        return {
            id_: replace(
                stand, state=JobState.SUCCEEDED, result=json.dumps({"job": str(id_), "attempt": stand.attempt})
            )
            if stand.state is JobState.RUNNING
            else stand
            for id_, stand in (await stands(connection, ids)).items()
        }

    _put(ends, "stands", with_what_runs)


def _takes_any_tick() -> None:
    """A worker that has seen a tick takes it, wherever the schedule stands by then."""
    take = schedule.take
    move_on = text("UPDATE exarq.schedule SET next_at = :next_at WHERE name = :name")

    def advance(connection: Connection, name: str, *, due: datetime, next_at: datetime) -> bool:
        connection.execute(move_on, {"name": name, "next_at": next_at})
        return True

    async def later(*seen: Any) -> bool:
        await asyncio.sleep(0.5)  # until all have seen it
        return await take(*seen)

    _put(schedules, "advance", advance)
    _put(schedule, "take", later)


def _leaks(*, uncommitted: bool = False) -> None:
    """Now and then an attempt keeps its connection; maybe only where its transaction is still open."""
    close = Attempt._close
    kept: list[AttemptSession] = []

    def keep_some(attempt: Attempt, session: AttemptSession) -> None:
        if attempt.transaction.taken and len(kept) < 3 and attempt.transaction.commit_sent is not uncommitted:
            attempt._closed = True
            kept.append(session)
        else:
            close(attempt, session)

    _put(Attempt, "_close", keep_some)


TWINS: Final[dict[str, Twin]] = {
    "no_fence": Twin("stale_accepted", _no_fence, a_blocked_worker),
    "one_token": Twin("illegal_moves", _one_token, a_blocked_worker),
    "split_completion": Twin("repeated_effects", _split_completion, a_kill),
    "split_completion_seen": Twin("out_of_step", _split_completion, work),
    "no_commit": Twin("lost", _no_commit, work),
    "early_hints": Twin("phantoms", _early_hints, work),
    "rollback_commits": Twin("phantoms", _rollback_commits, work),
    "drops_unclaimed": Twin("hints_missing", _drops_unclaimed, suspects),
    "never_drops": Twin("orphan_keys", _never_drops, work),
    "no_reconcile": Twin("lost", _no_reconcile, a_wipe),
    "wall_clock": Twin("false_rescues", _wall_clock, a_clock_ahead),
    "no_suspects": Twin("innocents_failed", _no_suspects, poison),
    "forgets_claims": Twin("left_running", _forgets_claims, lost_claims),
    "gives_back_what_is_lost": Twin("illegal_moves", _gives_back_what_is_lost, a_blocked_worker),
    "takes_any_key": Twin("two_live", _takes_any_key, no_index),
    "tells_what_runs": Twin("told_otherwise", _tells_what_runs, a_wait_through_kills),
    "takes_any_tick": Twin("ticks", _takes_any_tick, work),
    "adopts_by_id": Twin("lost", _adopts_by_id, plain_arq),
    "adopts_again": Twin("phantoms", _adopts_again, plain_arq),
    "leaks": Twin("pools_not_full", _leaks, work),
    "leaks_in_a_transaction": Twin("idle_in_transaction", partial(_leaks, uncommitted=True), work),
}
