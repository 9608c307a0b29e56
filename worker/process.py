"""The composition root: settings → the ARQ worker."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, aclosing, contextmanager, suppress
from types import FrameType
from typing import Any, Final, TypeAlias, cast

import arq.worker
from arq.jobs import Deserializer, Serializer

from worker.addresses import database_url, redis_url
from worker.alive import Upkeep, make_heartbeat
from worker.broker.connection import connect, require_database
from worker.core.errors import DefinitionError
from worker.core.registry import Definition, Registry, default_registry, load_modules
from worker.flow.availability import Availability
from worker.flow.claim import Claimer
from worker.flow.pump import Pump
from worker.flow.work import Work
from worker.hooks import Hooks
from worker.observe.events import (
    QueuesUnused,
    StepFailed,
    ThreadsLeft,
    WorkerStarted,
    WorkerStopped,
    WorkerStopping,
    emit,
)
from worker.resources import open_work, payloads_of
from worker.settings import Settings, load_settings
from worker.upkeep.heartbeat import Heartbeat

_WORK: Final = "exarq.work"
_SPARE_THREADS: Final = 4
_TURN_TO_END: Final = 0.5
"""Seconds in which a thread that has nothing to do any more has ended."""

# Python's own number of objects is a few jobs, so that the collector looks at those that run, again and again.
_COLLECT_AFTER: Final = 10_000

Obey: TypeAlias = Callable[[Callable[[bool], None]], None]
"""Is given the function that stops a worker, and calls it when somebody else than a signal asks for it."""


class Worker(arq.worker.Worker):
    """ARQ's worker, whose jobs live in PostgreSQL: claims, runs and completes until it is told to stop.

    Args:
        settings: all knobs; without them, `load_settings()`.
        registry: the definitions it runs; without one, those of `jobs.modules`.
        burst: end when no job is due and none runs.
        handle_signals: stop on SIGTERM and SIGINT; off where another program owns the process.
        obey: given the function that stops this worker, from any thread and again; True: gives back at once what runs.
        beaten: called after each try to beat, in the heartbeat's thread.
        job_serializer: as ARQ's, for the results of what plain ARQ's clients enqueued; None: `jobs.arq_serializer`.
        job_deserializer: as ARQ's, for what they enqueue; None: `jobs.arq_deserializer`.

    Raises:
        SettingsError: no address is set, or one names something of the user's that is not there.
        ModuleNotLoaded: a module of `jobs.modules`, or of such a name, cannot be imported.
        DefinitionError: no job is registered.

    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        registry: Registry | None = None,
        burst: bool = False,
        handle_signals: bool = True,
        obey: Obey | None = None,
        beaten: Callable[[], None] = lambda: None,
        job_serializer: Serializer | None = None,
        job_deserializer: Deserializer | None = None,
    ) -> None:
        self._settings = settings or load_settings()
        if registry is None:
            load_modules(self._settings.jobs.modules)
            registry = default_registry
        if not registry.names():
            raise DefinitionError(_no_jobs(self._settings.jobs.modules))
        self._registry = registry
        self._hooks = Hooks(self._settings.jobs)
        self._payloads = payloads_of(self._settings.jobs, job_serializer, job_deserializer)
        self._database_url, self._redis_url = database_url(self._settings), redis_url(self._settings)
        self._stop_requested = asyncio.Event()
        self._opened = AsyncExitStack()
        # Signals reach the main thread only, and a worker in another one does not own its process.
        self._owns_process = handle_signals and threading.current_thread() is threading.main_thread()
        self._hears_signals = False
        self._until_closed = ExitStack()
        self._obey, self._beaten = obey, beaten
        definitions = [registry.get(name) for name in registry.names()]
        super().__init__(
            functions=[_listed(definition) for definition in definitions],
            redis_pool=connect(self._redis_url, timeout=self._settings.redis.timeout),
            burst=burst,
            on_startup=self._open,
            on_shutdown=self._close,
            handle_signals=False,  # ARQ's handlers cancel running jobs
            max_jobs=self._settings.worker.concurrency,
        )

    def run(self) -> None:
        """Work until stopped, then close; a `sys.exit()` in a task that a job has started ends neither."""
        self.main_task = self.loop.create_task(self.main())
        try:
            while not self.main_task.done():
                try:
                    self.loop.run_until_complete(self.main_task)
                except (SystemExit, KeyboardInterrupt) as error:
                    if self.main_task.done() or not self._hears_signals:
                        raise
                    emit(StepFailed(step="a task that a job started", error=f"{type(error).__name__}: {error}"))
        finally:
            self.loop.run_until_complete(self.close())

    async def main(self) -> None:
        """Start up, work until stopped, stop in order; ARQ's own loop is not used, for it polls and pops."""
        self.ctx["redis"] = self.pool
        assert self.on_startup is not None
        await self.on_startup(self.ctx)
        if self._owns_process:
            gc.freeze()  # what was imported stays: the collector need not look at it again and again
            young, *older = gc.get_threshold()
            if young:  # somebody else may have switched it off
                gc.set_threshold(max(young, _COLLECT_AFTER), *older)
        await self._work(self.ctx[_WORK])

    async def close(self) -> None:
        """Close what the start opened; Redis may be away."""
        if self.on_shutdown is None or self._pool is None:
            return
        with self._until_closed:
            try:
                await self.on_shutdown(self.ctx)
            finally:
                await self.pool.aclose()
                self._pool = None

    def stop(self) -> None:
        """Stop as on SIGTERM: no more claims, what runs may end within the grace, the rest is given back."""
        self._stop_requested.set()

    async def _open(self, ctx: dict[Any, Any]) -> None:
        await require_database(self.pool, self._redis_url)
        work = await self._opened.enter_async_context(
            open_work(self._settings, self._database_url, self.pool, self._registry, ctx, self._payloads)
        )
        # The jobs' own client: what they hold of it must not keep the worker from Redis.
        redis = await self._opened.enter_async_context(
            aclosing(connect(self._redis_url, timeout=self._settings.redis.timeout))
        )
        ctx.update({_WORK: work, "engine": work.jobs_engine, "sessions": work.sessions, "redis": redis})

    async def _close(self, ctx: dict[Any, Any]) -> None:
        try:
            await self._hooks.finish(ctx)
        finally:
            await self._opened.aclose()

    async def _work(self, work: Work) -> None:
        worker, stop, redis = self._settings.worker, self._stop_requested, self.pool
        availability = Availability(redis)
        claimer = Claimer(work, redis, worker.queues, availability)
        pump = Pump(work, claimer, concurrency=worker.concurrency, burst=self.burst, stop=stop)
        upkeep = Upkeep(work, redis, availability, self._database_url)
        heartbeat = make_heartbeat(
            work, self._database_url, upkeep, owns_process=self._owns_process, beaten=self._beaten
        )
        self._until_closed.enter_context(self._signals(heartbeat, pump))  # a second signal may come later than the stop
        heartbeat.start()
        await self._start_hooks(heartbeat)
        if unused := _unused(worker.queues, work.registry):
            emit(QueuesUnused(queues=unused))
        await upkeep.start()
        emit(WorkerStarted(work.identity.id, worker.queues, worker.concurrency, work.registry.names()))
        try:
            await pump.until_stopped()
        finally:
            reason = "stop requested" if stop.is_set() else "nothing left to do"
            heartbeat.announce_stop()
            grace = heartbeat.grace_left
            emit(WorkerStopping(work.identity.id, reason, pump.running, grace.total_seconds()))
            try:
                await pump.finish(grace)
            finally:
                upkeep.stop()
                given_back = await heartbeat.finish()
                await pump.abandon()
                await upkeep.end()
                await availability.close()
        counts = work.counts
        emit(
            WorkerStopped(
                worker=work.identity.id,
                succeeded=counts.succeeded,
                failed=counts.failed,
                retried=counts.retried,
                released=counts.released + given_back,
            )
        )

    async def _start_hooks(self, heartbeat: Heartbeat) -> None:
        """The worker beats meanwhile, for a hook may take longer than a lease."""
        try:
            await self._hooks.start(self.ctx, self._stop_requested)
        except BaseException:
            await heartbeat.finish()
            raise

    @contextmanager
    def _signals(self, heartbeat: Heartbeat, pump: Pump) -> Iterator[None]:
        """Received by `signal.signal`, so that the heartbeat's thread learns of them even if the loop is blocked."""
        if not self._owns_process:
            yield
            return
        loop = asyncio.get_running_loop()
        signalled = False

        def stop(hurry: bool) -> None:
            heartbeat.announce_stop(hurry=hurry)
            with suppress(RuntimeError):  # the loop has just ended
                loop.call_soon_threadsafe(self._stop_requested.set)
                if hurry:
                    loop.call_soon_threadsafe(pump.hurry)

        def received(_number: int, _frame: FrameType | None) -> None:
            nonlocal signalled  # a parent's order is none: its manager may signal this process, too
            hurry, signalled = signalled, True
            stop(hurry)

        if self._obey:
            self._obey(stop)
        before = {number: signal.signal(number, received) for number in (signal.SIGTERM, signal.SIGINT)}
        self._hears_signals = True
        try:
            yield
        finally:
            self._hears_signals = False
            for number, handler in before.items():
                signal.signal(number, handler)


def __getattr__(name: str) -> Any:
    """`WorkerSettings`, for ARQ's own command; importing this module reads no settings."""
    if name != "WorkerSettings":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from worker.arq_command import worker_settings

    return worker_settings()


def _listed(definition: Definition[Any, ..., Any]) -> arq.worker.Function:
    # ARQ only lists it. Its own func() takes no `def`.
    return arq.worker.Function(definition.name, cast("Any", definition.fn), None, None, None, None)


def _unused(queues: Sequence[str], registry: Registry) -> tuple[str, ...]:
    used = {registry.get(name).rules.queue for name in registry.names()}
    return tuple(queue for queue in queues if queue not in used)


def _no_jobs(modules: Sequence[str]) -> str:
    if not modules:
        return "no jobs are registered; name the modules that define them in jobs.modules, or in EXARQ_JOBS_MODULES"
    named = ", ".join(modules)
    return f"{named} registers no jobs; decorate one with @job, or correct jobs.modules (EXARQ_JOBS_MODULES)"


def run_worker(
    settings: Settings,
    *,
    burst: bool = False,
    obey: Obey | None = None,
    beaten: Callable[[], None] = lambda: None,
) -> None:
    """Run a worker of these settings, on an event loop of its own, until it has stopped; the rest is as in `Worker`."""
    loop = _new_event_loop()
    asyncio.set_event_loop(loop)  # where ARQ looks for it
    # A thread for every job that asks for one: the usual few would make them wait, and every new connection too.
    loop.set_default_executor(ThreadPoolExecutor(settings.worker.concurrency + _SPARE_THREADS))
    try:
        Worker(settings, burst=burst, obey=obey, beaten=beaten).run()
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """That of uvloop where it is installed, for it spends less on each round trip."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def leave_threads_behind(code: int = 0) -> None:
    """End the process now if jobs have left threads that still work: the interpreter would wait for each of them."""
    others = [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    over = time.monotonic() + _TURN_TO_END
    for thread in others:  # those of a closed pool, which has looked names up, are about to end
        thread.join(max(over - time.monotonic(), 0))
    left = tuple(thread.name for thread in others if thread.is_alive())
    if left:
        emit(ThreadsLeft(threads=left))
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
