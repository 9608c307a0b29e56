"""What keeps every worker alive and the queue whole, whoever claims for it: the heartbeat, and the steps of upkeep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final

from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.core.watch import Watch
from worker.db.turns import CLOCK, RELAY
from worker.flow.availability import Availability
from worker.flow.complete import publish_moved
from worker.flow.work import Work
from worker.resources import HEARTBEAT_CONNECTIONS, open_processor_engine, open_relay_engine
from worker.upkeep.adopt_early import EarlyAdoption
from worker.upkeep.heartbeat import Heartbeat
from worker.upkeep.listen import listen
from worker.upkeep.loop import Step, every, when_called
from worker.upkeep.prune import prune
from worker.upkeep.reconcile import reconcile
from worker.upkeep.relay import relay
from worker.upkeep.rescue import Rescuer
from worker.upkeep.schedule import Ticker

_AFTER_STOP: Final = timedelta(seconds=1)
_CUT_SHORT: Final = ("listen", RELAY, "adopt")


class Upkeep:
    """The steps of this worker's event loop: those that a sweep calls for, and those that run by themselves.

    Args:
        work: the worker's parts.
        redis: the client that claims.
        availability: whether Redis is away.
        database_url: where the relay listens.

    """

    def __init__(self, work: Work, redis: ArqRedis, availability: Availability, database_url: str) -> None:
        self._interval = work.settings.worker.sweep
        self._ticker = Ticker(work)
        self._called_for: dict[str, Step] = {
            "reconcile": partial(reconcile, work, redis, availability),
            "prune": partial(prune, work),
            CLOCK: self._ticker.tick,
            RELAY: partial(relay, work, partial(open_relay_engine, work.settings, database_url, work.identity)),
        }
        self._by_themselves: dict[str, Step] = {
            "listen": partial(listen, work, redis, availability),
            "adopt": EarlyAdoption(work, redis, availability).step,
        }
        self._calls = {name: asyncio.Event() for name in self._called_for}
        self._stop = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Make the schedules that the code declares, then begin."""
        await self._ticker.synchronise()
        self._calls[CLOCK].set()
        for name, step in self._called_for.items():
            self._begin(name, when_called(self._calls[name], name, step, self._stop))
        for name, step in self._by_themselves.items():
            self._begin(name, every(self._interval, name, step, self._stop))

    def _begin(self, name: str, looping: Coroutine[Any, Any, None]) -> None:
        self._tasks[name] = asyncio.create_task(looping, name=f"exarq {name}")

    def call_for(self, steps: frozenset[str]) -> None:
        """These are due."""
        for step in steps & self._calls.keys():
            self._calls[step].set()

    def stop(self) -> None:
        """Begin nothing more."""
        self._stop.set()

    async def end(self) -> None:
        """Return when all have ended: what is halfway has a second, who only hears is cancelled."""
        self.stop()
        tasks = self._tasks.values()
        for name in self._tasks.keys() & _CUT_SHORT:
            self._tasks[name].cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_AFTER_STOP.total_seconds())
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def make_heartbeat(
    work: Work,
    database_url: str,
    upkeep: Upkeep,
    *,
    owns_process: bool,
    beaten: Callable[[], None] = lambda: None,
) -> Heartbeat:
    """The worker's heartbeat, which watches the other workers and calls for steps of upkeep, too; not started yet."""
    worker, loop = work.settings.worker, asyncio.get_running_loop()
    rescuer = Rescuer(
        work.identity,
        Watch(worker.lease, longest_gap=max(worker.sweep * 1.5, worker.lease / 3)),
        lease=worker.lease,
        sweep=worker.sweep,
        max_crashes=work.settings.jobs.max_crashes,
        moved=lambda moved: _soon(loop, partial(publish_moved, work, moved)),
        due=lambda steps: _soon(loop, partial(upkeep.call_for, steps)),
    )

    def make_engine() -> AsyncEngine:
        return open_processor_engine(work.settings, database_url, work.identity, connections=HEARTBEAT_CONNECTIONS)

    return Heartbeat(
        make_engine, work.identity, work.holdings, worker, rescuer=rescuer, owns_process=owns_process, beaten=beaten
    )


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has ended; reconcile elsewhere brings what was to be published
        loop.call_soon_threadsafe(call)
