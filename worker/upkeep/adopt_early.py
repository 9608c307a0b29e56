"""Adopt early: what plain ARQ code has deferred gets its row long before it is due, for Redis may be wiped."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from arq.connections import ArqRedis
from redis.exceptions import RedisError

from worker.broker import scripts, stock
from worker.broker.hints import Owner, owner_of
from worker.db.send import once
from worker.flow.adopt import adopt_all, arq_id_of
from worker.flow.after_commit import HORIZON
from worker.flow.availability import Availability
from worker.flow.work import Work

_PAGE: Final = 1_000
_BETWEEN_PAGES: Final = timedelta(milliseconds=200)
_REMEMBERED: Final = 100_000


class EarlyAdoption:
    """Walks the deferred ids in the worker's queues, a page at each step, round and round."""

    def __init__(self, work: Work, redis: ArqRedis, availability: Availability) -> None:
        self._work = work
        self._redis = redis
        self._availability = availability
        self._queues = list(work.settings.worker.queues)
        self._walked = 0
        self._known: set[tuple[bytes, float]] = set()

    async def step(self) -> timedelta | None:
        """Look at one page; returns for how long to rest: hardly before the next one, not at all after news."""
        if self._availability.away:
            return None
        queue = self._queues[0]
        try:
            if not await stock.has_ids(self._redis, queue):
                return self._round_ends()
            page = await stock.due_after(self._redis, queue, await self._latest(), skip=self._walked, count=_PAGE)
            found = await self._adopt(queue, {raw: score for raw, score in page if (raw, score) not in self._known})
        except RedisError as error:  # others may be PostgreSQL's
            self._availability.lost(error)
            return None
        if len(page) < _PAGE:
            return self._round_ends()
        self._walked += len(page)
        return timedelta(0) if found else _BETWEEN_PAGES

    def _round_ends(self) -> timedelta:
        """Another queue is next, after two sweeps: an idle worker hardly asks."""
        self._walked = 0
        self._queues.append(self._queues.pop(0))
        return self._work.settings.worker.sweep * 2

    async def _latest(self) -> float:
        """The latest that we put an id of our own, or that a claim hides one, in milliseconds by Redis' clock."""
        soon = HORIZON + self._work.settings.worker.lease
        return await stock.now_ms(self._redis) + soon / timedelta(milliseconds=1)

    async def _adopt(self, queue: str, scores: dict[bytes, float]) -> int:
        if not scores:
            return 0
        found = await scripts.payloads(self._redis, list(scores))
        plain = {
            arq_id: scores[raw]
            for raw, payload in found.items()
            if payload is not None and owner_of(raw, payload, self._work.installation) is Owner.PLAIN_ARQ
            if (arq_id := arq_id_of(raw)) is not None
        }
        if plain:
            await once(
                self._work.processor, lambda connection: adopt_all(self._work, self._redis, connection, queue, plain)
            )
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        self._known |= set(scores.items())
        return len(plain)
