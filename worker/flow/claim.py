"""Claim: take hints from Redis, then the jobs from PostgreSQL by primary key; without Redis, by a scan."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Final
from uuid import UUID, uuid4

from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.broker import scripts
from worker.broker.connection import UNREACHABLE
from worker.broker.hints import Owner, owner_of, parse_id
from worker.broker.scripts import Taken
from worker.core.states import JobState
from worker.db import kept, reads, transitions
from worker.db.reads import Standing
from worker.db.transitions import ClaimedJob
from worker.flow.adopt import adopt_all, arq_id_of
from worker.flow.availability import Availability
from worker.flow.holdings import Run
from worker.flow.work import Work
from worker.observe.events import HintLeftAlone, HintsDropping, HintsTaken, JobsClaimed, StepFailed, emit

LONGEST_WAIT: Final = timedelta(seconds=2)
"""How long an idle worker waits for a hint before it looks again; at most two thirds of the Redis timeout."""

_SCAN_EVERY: Final = timedelta(milliseconds=500)
_SHORTEST_WAIT: Final = timedelta(milliseconds=1)
_SHORTEST_SUSPECT_WAIT: Final = timedelta(milliseconds=20)
_REMEMBERED: Final = 10_000


class _RedisLost(Exception):
    """Raised here where Redis did not answer, for PostgreSQL's errors have partly the same classes."""


class Claimer:
    """Claims for one worker; knows which hints still have to leave Redis and when the next is due."""

    def __init__(self, work: Work, redis: ArqRedis, queues: Sequence[str], availability: Availability) -> None:
        self._work = work
        self._redis = redis
        self._queues = list(queues)
        self._availability = availability
        self._lease = work.settings.worker.lease
        self._longest_wait = min(LONGEST_WAIT, work.settings.redis.timeout * 2 / 3)
        self._to_drop: dict[str, dict[int, list[tuple[bytes, int]]]] = {}  # by queue and priority
        self._left_alone: set[bytes] = set()
        self._next_due = self._longest_wait

    async def claim(self, room: int) -> list[Run]:
        """Up to `room` jobs, held from now on by this process.

        Raises: what `worker.db.failures.is_transient` knows when PostgreSQL is away; hints taken for it are back then.
        """
        runs: list[Run] = []
        try:
            # A working connection before Redis is asked: else an outage of PostgreSQL hides the queue for a lease.
            async with self._work.claims.connect() as connection:
                await self._claim_into(runs, connection, room)
        except Exception as error:
            if not runs:
                raise
            # These are held already, so they must run; an outage that lasts meets the next claim too.
            emit(StepFailed(step="claim", error=f"{type(error).__name__}: {error}"))
        return runs

    async def _claim_into(self, runs: list[Run], connection: AsyncConnection, room: int) -> None:
        if not self._availability.away:
            try:
                await self._claim_by_hints(runs, connection, room)
                return
            except _RedisLost:
                if len(runs) == room:
                    return
        runs += await self._scan(connection, room - len(runs))

    async def wait(self) -> None:
        """Return when there may be something to claim."""
        if self._availability.away:
            await asyncio.sleep(_SCAN_EVERY.total_seconds())
            return
        with suppress(_RedisLost), self._noticing():
            limit = max(min(self._next_due, self._longest_wait), _SHORTEST_WAIT)
            await scripts.wait_for_hint(self._redis, self._queues, limit=limit)

    async def drop_claimed(self) -> None:
        """Let the hints of claimed jobs leave Redis that no later claim has taken along; losing this costs nothing."""
        if self._availability.away:
            return
        with suppress(_RedisLost):
            for queue in list(self._to_drop):
                await self._drop(queue)

    async def scan(self, room: int) -> list[Run]:
        """Up to `room` jobs by a scan, whatever Redis says."""
        async with self._work.claims.connect() as connection:
            return await self._scan(connection, room)

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except UNREACHABLE as error:
            self._availability.lost(error)
            raise _RedisLost from error

    async def _claim_by_hints(self, runs: list[Run], connection: AsyncConnection, room: int) -> None:
        self._next_due = self._longest_wait
        for queue in self._in_turn():
            if len(runs) == room:
                await self._drop(queue)
                continue
            to_drop = self._to_drop.get(queue, {})
            for hints in to_drop.values():
                emit(HintsDropping(queue=queue, hints=len(hints)))
            with self._noticing():
                taken = await scripts.claim(
                    self._redis, queue, limit=room - len(runs), lease=self._lease, to_drop=to_drop
                )
            to_drop.clear()
            if taken.next_due is not None:
                self._next_due = min(self._next_due, taken.next_due)
            if taken.hints:
                emit(HintsTaken(queue=queue, hints=len(taken.hints)))
                await self._claim_taken(runs, connection, taken)

    def _in_turn(self) -> list[str]:
        """The queues in the order given, the start rotating, so that none starves."""
        turn = list(self._queues)
        self._queues.append(self._queues.pop(0))
        return turn

    async def _drop(self, queue: str) -> None:
        lanes = self._to_drop.get(queue, {})
        for priority, to_drop in list(lanes.items()):
            emit(HintsDropping(queue=queue, hints=len(to_drop)))
            with self._noticing():
                await scripts.drop(self._redis, queue, to_drop, priority)
            del lanes[priority]

    async def _claim_taken(self, runs: list[Run], connection: AsyncConnection, taken: Taken) -> None:
        ids, others = {}, []
        for raw in taken.hints:
            job_id = parse_id(raw)
            if job_id is None:
                others.append(raw)
            else:
                ids[job_id] = raw
        token = uuid4()
        self._work.holdings.claiming(token)
        sent = time.monotonic()
        try:
            claimed = await transitions.claim(
                connection,
                list(ids),
                token=token,
                worker_id=self._work.identity.id,
                may_take_suspect=self._work.holdings.suspect_running is None,
                fetch=kept.fetch,
            )
            runs += self._claimed(token, claimed)
        except BaseException:
            self._work.holdings.forget(token)
            with suppress(_RedisLost), self._noticing():  # else they come back by themselves after a lease
                await scripts.put_back(self._redis, taken)
            raise
        done = {job.held.job_id for job in claimed}
        self._leave_redis(taken, [ids[job_id] for job_id in done])
        left = others + [raw for job_id, raw in ids.items() if job_id not in done]
        if left:
            await self._explain(connection, taken, left, sent)

    def _leave_redis(self, taken: Taken, raws: Sequence[bytes]) -> None:
        lanes = self._to_drop.setdefault(taken.queue, {})
        for priority, of_lane in taken.by_priority(raws).items():
            lanes.setdefault(priority, []).extend((raw, taken.score) for raw in of_lane)

    async def _explain(self, connection: AsyncConnection, taken: Taken, left: Sequence[bytes], sent: float) -> None:
        """Decide for each hint that could not be claimed whether it waits, leaves, or is not ours to judge."""
        ids = {raw: parse_id(raw) for raw in left}
        known = await reads.standings(connection, [job_id for job_id in ids.values() if job_id is not None])
        since_sent = timedelta(seconds=time.monotonic() - sent)
        waits: dict[bytes, timedelta] = {}
        strangers = []
        for raw, job_id in ids.items():
            standing = known.get(job_id) if job_id is not None else None
            if standing is None:
                strangers.append(raw)
            elif standing.state is not JobState.QUEUED:
                self._leave_redis(taken, [raw])
            elif (wait := self._wait_of(standing, since_sent)) is not None:
                waits[raw] = wait
        if waits:
            self._next_due = min(self._next_due, *waits.values())
            with self._noticing():
                await scripts.put_back(self._redis, taken, waits)
        if strangers:
            await self._judge_strangers(connection, taken, strangers)

    def _wait_of(self, standing: Standing, since_sent: timedelta) -> timedelta | None:
        """How long until this job may be claimed; None when it is locked and its hint returns by itself."""
        if standing.wait > timedelta(0):
            return standing.wait
        if -standing.wait <= since_sent:
            return timedelta(0)  # came due, or came back, between the claim and this look: not locked
        running = self._work.holdings.suspect_running
        if standing.suspect and running is not None:
            # As long again as the other suspect has run: short jobs follow quickly, long ones are seldom asked after.
            return max(_SHORTEST_SUSPECT_WAIT, min(timedelta(seconds=running), self._lease))
        return None

    async def _judge_strangers(self, connection: AsyncConnection, taken: Taken, raws: Sequence[bytes]) -> None:
        """Drop ids of ours without a row (rolled back, or pruned); adopt plain ARQ's, leave what belongs to others."""
        plain: dict[str, float] = {}
        with self._noticing():
            payloads = await scripts.payloads(self._redis, raws)
        for raw in raws:
            owner = owner_of(raw, payloads[raw], self._work.installation)
            arq_id = arq_id_of(raw) if owner is Owner.PLAIN_ARQ else None
            if owner is Owner.US:
                self._leave_redis(taken, [raw])
            elif arq_id is not None and raw not in taken.priorities:
                plain[arq_id] = taken.hints[raw]
            elif raw not in self._left_alone and len(self._left_alone) < _REMEMBERED:
                self._left_alone.add(raw)
                emit(HintLeftAlone(hint=raw.decode(errors="replace"), owner=owner.value))
        if plain:
            with self._noticing():
                await adopt_all(self._work, self._redis, connection, taken.queue, plain)

    async def _scan(self, connection: AsyncConnection, room: int) -> list[Run]:
        token = uuid4()
        self._work.holdings.claiming(token)
        try:
            claimed: list[ClaimedJob] = await transitions.claim_by_scan(
                connection,
                self._queues,
                room=room,
                token=token,
                worker_id=self._work.identity.id,
                may_take_suspect=self._work.holdings.suspect_running is None,
            )
        except BaseException:
            self._work.holdings.forget(token)
            raise
        return self._claimed(token, claimed)

    def _claimed(self, token: UUID, jobs: list[ClaimedJob]) -> list[Run]:
        runs = self._work.holdings.claimed(token, jobs)
        if jobs:
            emit(JobsClaimed(jobs=tuple(job.held.job_id for job in jobs)))
        return runs
