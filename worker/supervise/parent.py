"""The parent: keeps N worker processes running, gives the jobs of the dead back at once, and ends them all in order."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from worker.observe.events import (
    ProcessDied,
    ProcessesStarting,
    ProcessesStopped,
    ProcessesStopping,
    ProcessRefused,
    StepFailed,
    emit,
)
from worker.settings import Settings
from worker.supervise.backoff import Backoff
from worker.supervise.child import Child, Ended
from worker.supervise.give_back import give_back
from worker.supervise.lifeline import Order
from worker.upkeep.loop import sleep_unless

_PATIENCE: Final = timedelta(seconds=10)  # beyond the grace, after which a worker ends itself
_TO_RENEW: Final = timedelta(seconds=1)


def command(words: Sequence[str]) -> list[str]:
    """The command line of a worker process: spawned anew, never forked, so that it inherits no connection."""
    # Without -P a folder `worker` of the user's would be taken for ours; started with -m we may be found only by it.
    started_with_m = getattr(sys.modules["__main__"], "__package__", None) == "worker"
    return [sys.executable, *([] if started_with_m else ["-P"]), "-m", "worker", *words]


class Parent:
    """Runs the processes until they are stopped by SIGTERM or SIGINT, or a burst has ended.

    Args:
        settings: of the workers.
        command: what a process runs.
        burst: whether a process that ends with 0 has done its work.
        renewable: whether a process that refused to start waits for `renew`, instead of ending them all.

    """

    def __init__(
        self, settings: Settings, command: Sequence[str], *, burst: bool = False, renewable: bool = False
    ) -> None:
        self._settings = settings
        self._command = command
        self._burst = burst
        self._renewable = renewable
        self._news = asyncio.Event()
        self._children: set[Child] = set()
        self._rescues: set[asyncio.Task[None]] = set()
        self._first_is_settled = asyncio.Event()
        self._one_has_begun = False
        self._stopping = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        """Returns when every process has ended: the exit code, which is theirs when they refused to start."""
        loop = asyncio.get_running_loop()
        for asked in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(asked, self._received, asked)
        of = self._settings.worker.processes
        emit(ProcessesStarting(processes=of))
        async with asyncio.TaskGroup() as places:
            for number in range(1, of + 1):
                places.create_task(self._keep(number, of))
        if self._rescues:
            await asyncio.wait(self._rescues)
        emit(ProcessesStopped())
        return self._code

    def renew(self) -> None:
        """Have other processes take the place of all these: what runs has a second, then it runs there again."""
        self._order(Order.STOP)
        asyncio.get_running_loop().call_later(_TO_RENEW.total_seconds(), self._hurry, set(self._children))
        self._tell()

    async def _keep(self, number: int, of: int) -> None:
        """Keep one process running."""
        backoff = Backoff()
        if number > 1:
            await self._first_is_settled.wait()  # what is wrong with the settings is said once
        while not self._stopping.is_set():
            news = self._news  # told from here on, it is about this process
            try:
                child = await Child.start(self._command, number, of, self._has_begun)
            except (OSError, RuntimeError) as error:
                emit(StepFailed(step="start a worker process", error=f"{type(error).__name__}: {error}"))
                await sleep_unless(self._news, backoff.after(0))
                continue
            ended = await self._until_ended(child, news)
            self._first_is_settled.set()
            if news.is_set() and not self._stopping.is_set():  # renewed, so it is no matter how it ended
                if ended.code:
                    self._rescue(child.pid, ended)
                continue
            if ended.refused and self._renewable and not self._stopping.is_set():
                emit(ProcessRefused(process=number))
                await self._news.wait()
                continue
            if self._is_done(ended):
                return
            wait = backoff.after(ended.lived)
            restart_in = None if self._stopping.is_set() else wait.total_seconds()
            emit(ProcessDied(process=number, pid=child.pid, how=ended.how, restart_in=restart_in))
            self._rescue(child.pid, ended)
            await sleep_unless(self._news, wait)

    async def _until_ended(self, child: Child, news: asyncio.Event) -> Ended:
        self._children.add(child)
        if news.is_set():  # a stop, or another change of the code
            child.order(Order.STOP)
        try:
            return await child.ended()
        finally:
            self._children.discard(child)

    def _rescue(self, pid: int, ended: Ended) -> None:
        if ended.workers:
            rescue = asyncio.create_task(give_back(self._settings, pid, ended.workers, ended.how))
            self._rescues.add(rescue)
            rescue.add_done_callback(self._rescues.discard)

    def _has_begun(self) -> None:
        self._one_has_begun = True
        self._first_is_settled.set()

    def _is_done(self, ended: Ended) -> bool:
        """Whether it is not missed: it has done its work or its stop, or refused before any began, which ends all."""
        if (ended.refused or ended.away) and not self._one_has_begun:
            self._code = ended.code
            self._stop("a process refused to start")
            return True
        if self._stopping.is_set():
            if not ended.workers:
                return True
            self._code = self._code or min(abs(ended.code), 1)
        return ended.code == 0 and (self._burst or self._stopping.is_set())

    def _received(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            self._hurry(self._children)
        else:
            self._stop(number.name)

    def _stop(self, reason: str) -> None:
        if self._stopping.is_set():
            return
        emit(ProcessesStopping(reason=reason, processes=len(self._children)))
        self._stopping.set()
        self._tell()
        self._first_is_settled.set()
        self._order(Order.STOP)
        limit = self._settings.worker.grace + _PATIENCE
        asyncio.get_running_loop().call_later(limit.total_seconds(), self._kill)

    def _tell(self) -> None:
        """Whoever waits, waits no longer."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _hurry(self, children: set[Child]) -> None:
        for child in children & self._children:
            child.order(Order.HURRY)

    def _order(self, order: Order) -> None:
        for child in self._children:
            child.order(order)

    def _kill(self) -> None:
        for child in self._children:
            child.kill()
