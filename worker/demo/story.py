"""The story, in order: servers, tables, workers, producers, the two disasters, the rescue, the proof."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final

from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from worker.broker.connection import connect
from worker.db import migrate
from worker.demo.disaster import MUST_HOLD, ids_of, kill_one, wipe
from worker.demo.notebook import Notebook
from worker.demo.processes import DemoFailed, WorkerProcess, environment, killed_at_the_end
from worker.demo.producers import MODULES, PRODUCERS, Business
from worker.demo.proof import Findings, out_of_step, prove
from worker.demo.screen import Screen
from worker.embedded import servers as embedded
from worker.embedded.servers import Servers
from worker.flow.publish import Publisher

_BROKEN: Final = "worker.demo.broken"
_LEASE: Final = timedelta(seconds=10)
_LIMIT: Final = 600.0  # to give up at last; a loaded machine may take minutes
_LOOK_EVERY: Final = 0.2
_INTERRUPTED: Final = 130
_PROGRESS = text(
    "SELECT count(*) FILTER (WHERE state IN ('succeeded', 'failed', 'cancelled')), count(*) FROM exarq.job"
)


def run_demo(*, orders: int, broken: bool, json_only: bool = False) -> int:
    """Tell the story and prove its end; 0 when nothing was lost, nothing happened twice and nothing was made up.

    Args:
        orders: how many payment orders the producers place.
        broken: the workers commit a job's writes and its completion one after the other, which the proof must find.
        json_only: no story and no table, only the last line.

    Raises:
        ExarqError: it cannot begin; this is not a checkout, or a server does not start.

    """
    screen = Screen(json_only=json_only)
    business = Business()
    try:
        with embedded.start(fsync=True) as running:
            return asyncio.run(_tell(screen, business, running.urls, orders=orders, broken=broken))
    except (KeyboardInterrupt, asyncio.CancelledError):
        screen.complain("interrupted; the workers and the servers of the demo are gone")
        return _INTERRUPTED
    except DemoFailed as error:
        screen.complain(str(error))
        return 1


@dataclass(slots=True)
class Stage:
    """What the acts of the story share."""

    screen: Screen
    engine: AsyncEngine
    sessions: async_sessionmaker[AsyncSession]
    redis: ArqRedis
    business: Business
    notebook: Notebook
    orders: int
    broken: bool
    workers: list[WorkerProcess] = field(default_factory=list)
    victim: WorkerProcess | None = None
    held: int = 0
    wipes: int = 0
    waiting: int = 0
    distributions: int = 0


async def _tell(screen: Screen, business: Business, servers: Servers, *, orders: int, broken: bool) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    folder = servers.folder / "demo"  # removed with the servers, however we end
    folder.mkdir()
    async with _open_stage(screen, business, servers, folder, orders=orders, broken=broken) as stage:
        await _prepare(stage)
        modules = (_BROKEN, *MODULES) if broken else MODULES
        start = partial(WorkerProcess, folder=folder, environment=environment(servers, modules, folder))
        with killed_at_the_end(stage.workers), screen.bars("placed", "done"):
            await _perform(stage, start)
            in_order = await _stop(stage)
        found = await prove(stage.engine, stage.notebook.path)
    return _judge(stage, found, in_order=in_order)


@asynccontextmanager
async def _open_stage(
    screen: Screen, business: Business, servers: Servers, folder: Path, *, orders: int, broken: bool
) -> AsyncIterator[Stage]:
    async with contextlib.AsyncExitStack() as stack:
        engine = create_async_engine(servers.database_url, pool_size=PRODUCERS + 4)
        stack.push_async_callback(engine.dispose)
        redis = connect(servers.redis_url, timeout=timedelta(seconds=3))
        publisher = Publisher(redis, lease=_LEASE, closes_redis=True)
        stack.push_async_callback(publisher.close)
        notebook = stack.enter_context(contextlib.closing(Notebook(folder / "enqueues.jsonl")))
        sessions = async_sessionmaker(engine, expire_on_commit=False, info=publisher.info)
        yield Stage(screen, engine, sessions, redis, business, notebook, orders, broken)


async def _prepare(stage: Stage) -> None:
    async with stage.engine.connect() as connection:
        fsync = (await connection.execute(text("SHOW fsync"))).scalar_one()
        version = (await connection.execute(text("SHOW server_version"))).scalar_one()
    if fsync != "on":
        raise DemoFailed("this PostgreSQL does not wait for its disk (fsync is off), so it would prove nothing")
    stage.screen.say(f"A private PostgreSQL {version} (fsync {fsync}) and a private Redis are running.")
    await migrate.upgrade(stage.engine)
    async with stage.engine.begin() as connection:
        await stage.business.create_tables(connection)
    stage.screen.say("Migrated; the business has its own tables: orders, postings, an inventory of files.")


async def _perform(stage: Stage, start_worker: Callable[[str], WorkerProcess]) -> None:
    stage.screen.say(f"{PRODUCERS} producers place {stage.orders:,} payment orders, each in one transaction with")
    stage.screen.say("the job that will post it. Every tenth transaction rolls back.")
    try:
        async with asyncio.timeout(_LIMIT), asyncio.TaskGroup() as acts:
            acts.create_task(stage.business.place_orders(stage.orders, stage.sessions, stage.notebook))
            disasters = acts.create_task(_work_and_strike(stage, start_worker))
            acts.create_task(_follow(stage, disasters))
    except TimeoutError:
        stage.screen.complain(f"not all jobs have ended within {_LIMIT:g} s; the proof will show what is missing")
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _work_and_strike(stage: Stage, start_worker: Callable[[str], WorkerProcess]) -> None:
    """Start two workers; half-way, kill one in the middle of its work and wipe Redis."""
    await _until(stage, lambda: stage.notebook.ended >= stage.orders // 4)  # jobs wait, whoever is quicker
    for name in ("worker 1", "worker 2"):
        stage.workers.append(start_worker(name))
    stage.screen.say(f"Two workers start, two processes; {stage.notebook.committed} jobs wait for them already.")
    await _until(stage, lambda: stage.notebook.ended >= stage.orders // 2)
    stage.distributions = await stage.business.take_inventory(stage.sessions, stage.notebook)
    stage.screen.say(
        f"Half-way. One more transaction places a catalogue job for each of the {stage.distributions} distributions"
    )
    stage.screen.say(
        "installed here: it stores every file with its hash, and enqueues a follow-up that writes the totals."
    )

    stage.victim, stage.held = await kill_one(stage.engine, stage.workers, between_commits=stage.broken)
    stage.screen.say(f"SIGKILL: {stage.victim.name} is dead, with {stage.held} jobs running in it.", "bold red")
    stage.wipes, stage.waiting = await wipe(stage.redis)
    stage.screen.say(f"FLUSHALL: Redis has lost everything, {stage.waiting:,} waiting hints too.", "bold red")
    async with stage.engine.connect() as connection:
        wrong = await out_of_step(connection)
    stage.screen.say(f"A look from outside, right now: {wrong} jobs with a result but no effect, or the reverse.")


async def _follow(stage: Stage, disasters: asyncio.Task[None]) -> None:
    """Show how far things are until every committed job and its follow-up has ended."""
    rescued, waits_at = False, -1
    async with stage.engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
        while True:
            final, known = (await connection.execute(_PROGRESS)).one()
            expected = stage.orders + stage.distributions
            if stage.victim and not rescued and stage.victim.pid not in await ids_of(connection, stage.workers):
                rescued = True
                stage.screen.say(
                    f"The other worker has heard nothing from it for {_LEASE.total_seconds():g} s:"
                    f" its {stage.held} jobs run again.",
                    "bold green",
                )
            if final != waits_at:  # while only the lease is awaited, one line has said so
                stage.screen.show(placed=(stage.notebook.ended, expected), done=(final, known))
            everything_placed = disasters.done() and stage.notebook.ended == expected
            if everything_placed and waits_at < 0 and not rescued and final == known - stage.held:
                waits_at = final
                stage.screen.say(
                    f"{final:,} of {known:,} done; waiting for the lease of the killed worker to end:"
                    f" {_LEASE.total_seconds():g} s without a beat."
                )
            if everything_placed and final == known:
                stage.screen.say(f"All {known:,} jobs are done, follow-ups included.")
                return
            _require_workers(stage)
            await asyncio.sleep(_LOOK_EVERY)


async def _until(stage: Stage, condition: Callable[[], bool]) -> None:
    while not condition():
        _require_workers(stage)
        await asyncio.sleep(0.01)


def _require_workers(stage: Stage) -> None:
    for worker in stage.workers:
        worker.require_running()


async def _stop(stage: Stage) -> bool:
    """Stop the worker that is left, as a deployment does; True when it ended in order."""
    codes = []
    for worker in stage.workers:
        if worker is not stage.victim:
            worker.send(signal.SIGTERM)
            codes.append(await asyncio.to_thread(worker.wait))
            stage.screen.say(f"SIGTERM: {worker.name} stopped with exit code {codes[-1]}.")
    return codes == [0]


def _judge(stage: Stage, found: Findings, *, in_order: bool) -> int:
    screen = stage.screen
    screen.say(f"{found.files:,} files of {found.distributions} distributions are catalogued.")
    screen.plain()
    screen.table(found)
    happened = stage.held >= MUST_HOLD and stage.waiting > 0 and in_order
    held = found.promise_held and found.succeeded == found.enqueued
    if held and happened:
        screen.plain(
            "[green]A job exists if and only if its transaction committed, and it took effect exactly once.[/]"
        )
    elif stage.broken and found.repeated_effects:
        screen.plain("[red]As broken on purpose: the writes were committed, the completion was not yet.[/]")
    else:
        screen.complain("the promise does not hold" if happened else "the story did not go as it should")
    screen.plain("Where to look next: README.md; the jobs of this demo are jobs/ledger.py and jobs/inventory.py.")
    screen.last_line(
        {
            "enqueued": found.enqueued,
            "rolled_back": found.rolled_back,
            "succeeded": found.succeeded,
            "lost": found.lost,
            "repeated_effects": found.repeated_effects,
            "phantoms": found.phantoms,
            "workers_killed": int(stage.victim is not None),
            "running_when_killed": stage.held,
            "redis_wipes": stage.wipes,
            "hints_when_wiped": stage.waiting,
            "seconds": round(screen.seconds, 1),
        }
    )
    return 0 if held and happened else 1
