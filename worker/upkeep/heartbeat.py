"""Heartbeat: a thread of its own says that this process is alive, and compares what it holds with what the rows say.

In a thread, because a job that blocks the event loop does not make a dead worker. For the same reason the thread has
the last word at a stop: when the loop does not come to an end, it gives the jobs back and ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.core.pace import Pace
from worker.db import reads, transitions, workers
from worker.db.ids import uuid7
from worker.db.send import Send, once
from worker.flow.holdings import Because, Holdings, Run
from worker.flow.work import Identity
from worker.observe.events import ClaimForgotten, SelfFenced, StepFailed, WorkerRenewed, emit
from worker.settings import WorkerSettings
from worker.upkeep.loop import every, sleep_unless
from worker.upkeep.pulse import LOOK_EVERY, Pulse
from worker.upkeep.rescue import Rescuer

T = TypeVar("T")

_BLOCKED_AFTER: Final = 0.5
_LAST_WORDS: Final = timedelta(seconds=1)
_LOOK_EVERY: Final = timedelta(milliseconds=10)
_PATIENCE: Final = timedelta(seconds=5)  # with a loop that still moves, beyond the grace
_EXIT_FORCED: Final = 1
_EXIT_STALLED: Final = 70
_FORGOTTEN: Final = "the claim was never answered"


@dataclass(frozen=True, slots=True)
class Compared:
    """What a beat found: whether the worker's row is there, and which of its runs must not go on."""

    alive: bool
    lost: list[Run]
    flagged: list[Run]


async def beat(connection: AsyncConnection, identity: Identity, holdings: Holdings, *, looks: bool = True) -> Compared:
    """One beat: still alive; where it looks, it gives back rows unknown here and finds runs that are held no longer."""
    held_before = holdings.runs()  # what is claimed after this line may not yet stand in the rows that are read
    alive, rows = await workers.beat(connection, identity.id, looks=looks)
    if rows is None:
        return Compared(alive, lost=[], flagged=[])
    forgotten = holdings.unknown(rows)
    if forgotten:
        moved = await transitions.release_many(connection, forgotten, _FORGOTTEN)
        if moved:
            emit(ClaimForgotten(jobs=tuple(job.job_id for job in moved)))
    return Compared(
        alive,
        lost=[run for held, run in held_before.items() if held not in rows],
        flagged=[run for held, run in held_before.items() if rows.get(held)],
    )


class Heartbeat:
    """The thread; `start` it on the worker's event loop, end it with `finish`.

    Args:
        make_engine: makes the thread's own engine, in the thread.
        identity: which worker this process is; renewed here when its row is gone.
        holdings: what the process holds.
        settings: the worker's settings.
        rescuer: watches the other workers meanwhile, in the same thread, on a connection of its own.
        owns_process: whether the thread may end the process when the loop does not come to an end.
        beaten: called in the thread after each try to beat: this process lives, whoever does not answer.

    """

    def __init__(
        self,
        make_engine: Callable[[], AsyncEngine],
        identity: Identity,
        holdings: Holdings,
        settings: WorkerSettings,
        *,
        rescuer: Rescuer | None = None,
        owns_process: bool = True,
        beaten: Callable[[], None] = lambda: None,
    ) -> None:
        self._make_engine = make_engine
        self._identity = identity
        self._holdings = holdings
        self._settings = settings
        self._rescuer = rescuer
        self._owns_process = owns_process
        self._beaten = beaten
        self._former: list[UUID] = []
        self._main_loop = asyncio.get_running_loop()
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._wakeup: asyncio.Event | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="exarq heartbeat", daemon=True)
        self._announce = False
        self._finish = False
        self._grace_ends: float | None = None
        self._last_beat = time.monotonic()
        self._fenced = False
        self._pulse = Pulse(self._main_loop, holdings)
        self._given_back = 0
        self._looks = Pace(settings.lease)
        self._look_failed = False

    def start(self) -> None:
        """Beat from now on."""
        self._thread.start()
        self._started.wait()

    def announce_stop(self, *, hurry: bool = False) -> None:
        """The process was asked to stop: say so, and end it if the loop has not done so by the end of the grace.

        May be called from a signal handler; with `hurry` the grace ends now.
        """
        if self._grace_ends is None:
            self._grace_ends = time.monotonic() + self._settings.grace.total_seconds()
            self._announce = True
        if hurry:
            self._grace_ends = min(self._grace_ends, time.monotonic())
        self._wake()

    @property
    def grace_left(self) -> timedelta:
        """How long what runs may still go on after the stop was announced."""
        if self._grace_ends is None:
            return self._settings.grace
        return timedelta(seconds=max(0.0, self._grace_ends - time.monotonic()))

    async def finish(self) -> int:
        """Give back what still runs under this worker's id, delete its row, end the thread; returns how many."""
        self._finish = True
        self._wake()
        while self._thread.is_alive():  # noqa: ASYNC110 — joined in the pool of threads it would wait behind the jobs'
            await asyncio.sleep(_LOOK_EVERY.total_seconds())
        return self._given_back

    def _wake(self) -> None:
        loop, wakeup = self._own_loop, self._wakeup
        if loop is not None and wakeup is not None:
            with contextlib.suppress(RuntimeError):  # the thread has just ended, or starts its loop anew
                loop.call_soon_threadsafe(wakeup.set)

    # ── in the thread ───────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        """Beat until finished; what nobody has foreseen must not leave a process that works and does not beat."""
        while True:
            try:
                asyncio.run(self._beat_until_finished())
                return
            except Exception as error:
                emit(StepFailed(step="heartbeat thread", error=f"{type(error).__name__}: {error}"))
                if self._finish or self._main_loop.is_closed():
                    return
                time.sleep(min(self._settings.beat, _LAST_WORDS).total_seconds())
            finally:
                self._started.set()

    async def _beat_until_finished(self) -> None:
        self._wakeup = asyncio.Event()
        self._own_loop = asyncio.get_running_loop()
        self._started.set()
        engine = self._make_engine()
        beside = asyncio.gather(
            self._start_rescue(engine), every(LOOK_EVERY, "look at the loop", self._watch_the_loop, asyncio.Event())
        )
        try:
            while not self._finish:
                await self._beat(engine)
                if self._main_loop.is_closed():
                    raise RuntimeError("the worker's event loop was closed and did not say goodbye")
                if self._announce:
                    self._announce = False
                    await self._try("announce the stop", engine, self._announce_stop)
                if self._must_end():
                    break
                self._wakeup.clear()
                if not self._finish:
                    await sleep_unless(self._wakeup, self._until_next_beat())
            await self._try("give the jobs back", engine, self._say_goodbye)
            if not self._finish and self._owns_process:
                os._exit(_EXIT_FORCED)
        finally:
            beside.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS.total_seconds()):
                    await asyncio.gather(beside, return_exceptions=True)
                    await engine.dispose()

    def _start_rescue(self, engine: AsyncEngine) -> asyncio.Future[None]:
        rescuer, never = self._rescuer, asyncio.Event()
        if rescuer is None:
            return asyncio.get_running_loop().create_future()
        looking = every(self._settings.sweep, "rescue", lambda: rescuer.look(engine), never)
        return asyncio.create_task(looking, name="exarq rescue")

    def _must_end(self) -> bool:
        """Whether the loop should have come to its end by now, and either is blocked or had time enough."""
        if self._grace_ends is None:
            return False
        late = time.monotonic() - self._grace_ends
        blocked = self._pulse.blocked >= _BLOCKED_AFTER
        return late > _PATIENCE.total_seconds() or (blocked and late > _LAST_WORDS.total_seconds())

    def _until_next_beat(self) -> timedelta:
        if self._grace_ends is None:
            lease_left = timedelta(seconds=self._lease_left)
            return min(self._settings.beat, lease_left) if lease_left else self._settings.beat
        left = self.grace_left + _LAST_WORDS if self.grace_left else _LAST_WORDS / 4
        return min(self._settings.beat, left)

    async def _beat(self, engine: AsyncEngine) -> None:
        sent = time.monotonic()
        lease_ends = asyncio.get_running_loop().call_later(self._lease_left, self._fence)
        looks, began = self._looks.due, self._looks.now()
        compared = await self._try("heartbeat", engine, partial(self._compare, looks=looks))
        if compared is None and looks and self._grace_ends is None:
            self._beaten()
            sent = time.monotonic()
            compared = await self._try("heartbeat without a look", engine, partial(self._compare, looks=False))
            if compared is not None and self._look_failed:  # twice in a row: not a connection that hung
                self._looks.rest(began)
            self._look_failed = True
        lease_ends.cancel()
        self._beaten()
        if compared is None:
            self._fence()
            return
        self._last_beat, self._fenced = sent, False
        self._cancel(compared.lost, Because.LEASE_LOST)
        self._cancel(compared.flagged, Because.CANCEL_REQUESTED)
        if not compared.alive:
            await self._try("start anew", engine, self._start_anew)
        if self._former:
            await self._try("give back what a former id holds", engine, self._give_back_former)

    async def _compare(self, connection: AsyncConnection, *, looks: bool) -> Compared:
        began = self._looks.now()
        compared = await beat(connection, self._identity, self._holdings, looks=looks)
        if looks:
            self._looks.rest(began)
            self._look_failed = False
        return compared

    @property
    def _lease_left(self) -> float:
        """For how many seconds nobody can have found this worker dead."""
        return max(0.0, self._last_beat + self._settings.lease.total_seconds() - time.monotonic())

    def _fence(self) -> None:
        """Without a beat for a lease others may run the jobs: cancel all, at each try those that began since."""
        if self._lease_left > 0:
            return
        runs = list(self._holdings.runs().values())
        if not self._fenced:
            self._fenced = True
            emit(SelfFenced(worker=self._identity.id, runs=len(runs)))
        self._cancel(runs, Because.FENCED)

    async def _start_anew(self, connection: AsyncConnection) -> None:
        old, new = self._identity.id, uuid7()
        self._cancel(self._holdings.runs().values(), Because.LEASE_LOST)
        await workers.register(connection, new, queues=self._settings.queues, concurrency=self._settings.concurrency)
        self._identity.id = new
        self._former.append(old)
        emit(WorkerRenewed(old=old, new=new))

    async def _give_back_former(self, connection: AsyncConnection) -> None:
        """A claim that was on its way under a former id would wait for a rescue, and be blamed for a crash."""
        for former in self._former:
            running = await reads.running_under(connection, former)
            if running:
                moved = await transitions.release_many(connection, list(running), Because.LEASE_LOST)
                emit(ClaimForgotten(jobs=tuple(job.job_id for job in moved)))

    async def _announce_stop(self, connection: AsyncConnection) -> None:
        await workers.announce_stop(connection, self._identity.id)

    async def _say_goodbye(self, connection: AsyncConnection) -> None:
        for mine in (self._identity.id, *self._former):
            running = await reads.running_under(connection, mine)
            if running:
                self._given_back += len(await transitions.release_many(connection, list(running), Because.STOPPING))
        await workers.unregister(connection, self._identity.id)

    async def _try(self, what: str, engine: AsyncEngine, send: Send[T]) -> T | None:
        """Send once, within a third of a lease; a failure is told and the next beat comes anyway."""
        try:
            async with asyncio.timeout(self._settings.lease.total_seconds() / 3):
                return await once(engine, send)
        except Exception as error:
            emit(StepFailed(step=what, error=f"{type(error).__name__}: {error}"))
            return None

    def _cancel(self, runs: Iterable[Run], because: Because) -> None:
        for run in runs:
            self._main_loop.call_soon_threadsafe(run.cancel, because)

    async def _watch_the_loop(self) -> None:
        if not self._main_loop.is_closed():
            self._pulse.look()
        if self._pulse.blocked >= self._settings.stall_limit.total_seconds() and self._owns_process:
            os._exit(_EXIT_STALLED)  # its jobs go to others once it is seen silent, as after any crash
