"""A worker that stopped beating: its jobs run elsewhere, once, and the blame falls on the right ones."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from tests.db.conftest import statements_of
from tests.life import jobs_for_tests as jobs
from tests.processes import worker_process, workers
from tests.proxy import postgres_proxy
from tests.support import a_job, a_work, a_worker, attempts, heard, row, state, until
from worker.core.pace import Pace
from worker.core.watch import Watch
from worker.db import reads
from worker.db import workers as worker_rows
from worker.flow.complete import publish_moved
from worker.observe.events import StepFailed, WorkerRenewed, WorkerRescued
from worker.settings import Settings
from worker.upkeep import rescue as module
from worker.upkeep.rescue import Rescuer

Sessions = async_sessionmaker[AsyncSession]

pytestmark = [pytest.mark.timeout(300), pytest.mark.hasty]  # processes start slowly on a loaded machine


@pytest.fixture(autouse=True)
async def _effects(engine: AsyncEngine) -> None:
    await jobs.make_effects(engine)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return tmp_path / "lines"


async def test_the_jobs_of_a_killed_worker_run_again(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    (job,) = await jobs.enqueue_all(sessions, jobs.holding.call("work", 60))
    async with worker_process(settings, engine, lines=lines) as worker:
        await until(lambda: jobs.lines(lines) == ["began work 1"], "the job has written")
        worker.send(signal.SIGKILL)

        async with heard() as events, a_worker(settings, jobs.registry()):
            await until(lambda: _is(engine, job, "succeeded"), "the job runs elsewhere")

    assert await jobs.effects(engine) == ["work 2"]
    assert [(one.ending, one.number) for one in await attempts(engine, job)] == [("crashed", 1)]
    assert [event.jobs for event in events if isinstance(event, WorkerRescued)] == [1]


async def test_a_zombie_holds_nothing_up_and_writes_nothing_late(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    (job,) = await jobs.enqueue_all(sessions, jobs.holding.call("work", 5))
    async with worker_process(settings, engine, lines=lines) as zombie:
        await until(lambda: jobs.lines(lines) == ["began work 1"], "the job has written and holds its transaction")
        returns_at = time.monotonic() + 5
        (zombie_id,) = await workers(engine)
        zombie.send(signal.SIGSTOP)

        async with a_worker(settings, jobs.registry()):
            await until(lambda: _is(engine, job, "succeeded"), "the job runs elsewhere")
            assert await _connected_as(engine, zombie_id) == 0
            await until(lambda: time.monotonic() > returns_at, "the zombie's job returns as soon as it goes on")
            zombie.send(signal.SIGCONT)
            await until(lambda: zombie.said("starts anew"), "the zombie notices")
            (again,) = await jobs.enqueue_all(sessions, jobs.note.call("again"))
            await until(lambda: _is(engine, again, "succeeded"), "work goes on")

        (other,) = await jobs.enqueue_all(sessions, jobs.note.call("by the zombie"))
        await until(lambda: _is(engine, other, "succeeded"), "the zombie works under its new id")
    assert await jobs.effects(engine) == ["again", "by the zombie", "work 2"]
    assert (await row(engine, job)).attempt == 2


async def test_an_outage_longer_than_the_lease_convicts_nobody(
    engine: AsyncEngine, sessions: Sessions, settings: Settings
) -> None:
    settings = settings.model_copy(
        update={"worker": settings.worker.model_copy(update={"lease": timedelta(seconds=8)})}
    )
    async with postgres_proxy(str(settings.database.url)) as (proxy, url):
        through = settings.model_copy(update={"database": settings.database.model_copy(update={"url": url})})
        async with heard() as events, a_worker(through, jobs.registry()), a_worker(through, jobs.registry()):
            await until(lambda: _count(workers(engine), 2), "both beat")
            before = await workers(engine)

            proxy.refuse()
            await asyncio.sleep(settings.worker.lease.total_seconds() * 1.5)  # the outage itself
            proxy.restore()

            (job,) = await jobs.enqueue_all(sessions, jobs.note.call("after"))
            await until(lambda: _is(engine, job, "succeeded"), "work goes on")
            restored = await _beats(engine)
            await until(lambda: _all_beat_again(engine, restored), "both beat again")
            assert set(await workers(engine)) == set(before)
    assert [event for event in events if isinstance(event, (WorkerRescued, WorkerRenewed))] == []


async def test_a_job_that_kills_its_process_is_failed_and_its_neighbours_never(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    poison, *neighbours = await jobs.enqueue_all(
        sessions, jobs.crash.call(), *(jobs.slow.call(f"{n}", 0.1) for n in range(12))
    )

    for _ in range(6):
        if await state(engine, poison) == "failed":
            break
        async with worker_process(settings, engine, lines=lines, registered=False) as worker:
            await until(
                lambda: _ended_or_failed(worker, engine, poison), "the process dies or the poison is failed", 45
            )
    async with a_worker(settings, jobs.registry()):
        await until(lambda: _all_are(engine, neighbours, "succeeded"), "the neighbours succeed")

    found = await row(engine, poison)
    assert (found.state, found.crashes, found.failures) == ("failed", 4, 0)
    assert jobs.lines(lines).count("began crash") == 4
    assert await jobs.effects(engine) == sorted(str(n) for n in range(12))


async def test_a_worker_that_had_announced_its_stop_costs_its_jobs_nothing(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_work(settings) as work:
        dead = await _a_worker_row(engine, stopping=True)
        job = await a_job(engine, state="running", worker_id=dead, crashes=2)

        await _rescue_dead(work)

    found = await row(engine, job)
    assert (found.state, found.failures, found.crashes) == ("queued", 0, 2)
    assert [one.ending for one in await attempts(engine, job)] == ["released"]


async def test_rows_that_run_under_no_worker_are_rescued(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings) as work:
        job = await a_job(engine, state="running", worker_id=uuid4())

        await _rescue_dead(work)

    assert await state(engine, job) == "queued"


def sweeps_that_take(monkeypatch: pytest.MonkeyPatch, *, look: float, error: Exception | None = None) -> list[bool]:
    """By the clock of its looks each sweep that looks takes so many seconds, and ends in this error; which looked."""
    looked: list[bool] = []
    clock = [0.0]
    sweep = reads.sweep

    async def taking(connection: AsyncConnection, *, looks: bool, **far: Any) -> reads.Seen:
        looked.append(looks)
        clock[0] += look if looks else 0
        if looks and error is not None:
            raise error
        return await sweep(connection, looks=looks, **far)

    monkeypatch.setattr(reads, "sweep", taking)
    monkeypatch.setattr(module, "Pace", partial(Pace, clock=lambda: clock[0]))
    return looked


async def test_rows_under_no_worker_are_rescued_though_the_next_look_has_no_time_for_jobs(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = sweeps_that_take(monkeypatch, look=60)
    async with a_work(settings) as work, heard() as events:
        job = await a_job(engine, state="running", worker_id=uuid4())
        rescuer = _rescuer(work, Watch(work.settings.worker.lease, longest_gap=timedelta(hours=1)))

        await rescuer.look(work.processor)
        seen_first = await state(engine, job)
        later = time.monotonic() + work.settings.worker.lease.total_seconds()
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later))
        await rescuer.look(work.processor)
        await rescuer.look(work.processor)

    assert (seen_first, await state(engine, job)) == ("running", "queued")
    assert looked == [True, False, False]
    assert len([event for event in events if isinstance(event, WorkerRescued)]) == 1


async def test_rows_under_no_worker_that_somebody_has_given_back_since_are_nobodys_to_rescue(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    async def note(_connection: AsyncConnection, application_name: str) -> None:
        ended.append(application_name)

    async with a_work(settings) as work, heard() as events:
        monkeypatch.setattr(worker_rows, "end_backends", note)
        gone = uuid4()

        moved = await module.rescue_from(work.processor, gone, None, reason="silent", max_crashes=3)

    assert moved is None
    assert not ended
    assert not any(isinstance(event, WorkerRescued) for event in events)


async def test_a_rescue_of_rows_under_no_worker_that_fails_is_tried_again_before_the_next_look_at_jobs(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = worker_rows.lock_for_rescue
    failures = [RuntimeError("not now")]

    async def failing(connection: AsyncConnection, worker_id: UUID) -> bool:
        if failures:
            raise failures.pop()
        return await lock(connection, worker_id)

    sweeps_that_take(monkeypatch, look=60)
    monkeypatch.setattr(worker_rows, "lock_for_rescue", failing)
    async with a_work(settings) as work:
        job = await a_job(engine, state="running", worker_id=uuid4())
        rescuer = _rescuer(work, Watch(timedelta(0), longest_gap=timedelta(hours=1)))

        await rescuer.look(work.processor)
        seen_first = await state(engine, job)
        await rescuer.look(work.processor)

    assert (seen_first, await state(engine, job)) == ("running", "queued")


async def test_a_look_at_jobs_that_fails_hides_no_worker(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = sweeps_that_take(monkeypatch, look=3, error=TimeoutError())
    async with a_work(settings) as work:
        dead = uuid4()
        async with engine.begin() as connection:
            await worker_rows.register(connection, dead, queues=["default"], concurrency=1)
        job = await a_job(engine, state="running", worker_id=dead)
        rescuer = _rescuer(work, Watch(timedelta(0), longest_gap=timedelta(hours=1)))

        await rescuer.look(work.processor)
        await rescuer.look(work.processor)

    assert await state(engine, job) == "queued"
    assert looked == [True, False, False]


async def test_a_beat_between_the_look_and_the_rescue_saves_the_worker(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_work(settings) as work:
        alive = await _a_worker_row(engine)
        job = await a_job(engine, state="running", worker_id=alive)
        lock = worker_rows.lock_for_rescue

        async def beat_first(connection: Any, worker_id: Any) -> bool:
            async with engine.begin() as other:
                await worker_rows.beat(other, worker_id)
            return await lock(connection, worker_id)

        monkeypatch.setattr(worker_rows, "lock_for_rescue", beat_first)
        await _rescue_dead(work)

    assert await state(engine, job) == "running"
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE exarq.job SET state = 'queued'"))


async def test_several_rescuers_rescue_once(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings) as one, a_work(settings) as two, a_work(settings) as three:
        dead = await _a_worker_row(engine)
        found = [await a_job(engine, state="running", worker_id=dead) for _ in range(50)]
        async with heard() as events:
            await asyncio.gather(*(_rescue_only(work, dead) for work in (one, two, three)))

    assert sum(event.jobs for event in events if isinstance(event, WorkerRescued)) == 50
    assert {(await row(engine, job)).crashes for job in found} == {1}
    assert {len(await attempts(engine, job)) for job in found} == {1}


async def test_one_worker_that_cannot_be_rescued_keeps_no_other_from_it(
    engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_work(settings) as work:
        first, second = await _a_worker_row(engine), await _a_worker_row(engine)
        jobs_of = [await a_job(engine, state="running", worker_id=dead) for dead in (first, second)]
        end_backends = worker_rows.end_backends

        async def fail_for_the_first(connection: Any, name: str) -> None:
            if str(first) in name:
                raise RuntimeError("not now")
            await end_backends(connection, name)

        monkeypatch.setattr(worker_rows, "end_backends", fail_for_the_first)
        async with heard() as events:
            await _rescue_dead(work)
        monkeypatch.undo()
        stuck = await state(engine, jobs_of[0])
        await _rescue_dead(work)

    assert [event.error for event in events if isinstance(event, StepFailed)] == ["RuntimeError: not now"]
    assert stuck == "running"
    assert [await state(engine, job) for job in jobs_of] == ["queued", "queued"]


async def test_a_cancel_that_was_asked_for_is_kept_by_the_rescue(engine: AsyncEngine, settings: Settings) -> None:
    async with a_work(settings) as work:
        job = await a_job(engine, state="running", worker_id=uuid4(), cancel_requested=True)

        await _rescue_dead(work)

    assert await state(engine, job) == "cancelled"


async def test_the_next_look_is_when_a_lease_ends_and_at_the_latest_after_a_sweep(
    engine: AsyncEngine, settings: Settings
) -> None:
    await _a_worker_row(engine)
    async with a_work(settings) as work:
        soon = Watch(timedelta(seconds=0.1), timedelta(hours=1))
        late = Watch(timedelta(hours=1), timedelta(hours=1))

        assert timedelta(0) < await _rescuer(work, soon).look(work.processor) <= timedelta(seconds=0.1)
        assert await _rescuer(work, late).look(work.processor) == settings.worker.sweep


async def test_workers_whose_loops_are_all_blocked_still_rescue(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    async with worker_process(settings, engine, lines=lines) as dead:
        await jobs.enqueue_all(sessions, jobs.holding.call("work", 60))
        await until(lambda: jobs.lines(lines) == ["began work 1"], "the job has written")
        async with worker_process(settings, engine, lines=lines) as blocked:
            await jobs.enqueue_all(sessions, jobs.blocking.call("loop", 40))
            await until(lambda: "began loop" in jobs.lines(lines), "the other loop is blocked")
            dead.send(signal.SIGKILL)

            await until(lambda: blocked.said("rescued"), "the thread of the blocked one rescues")

            assert "loop" not in await jobs.effects(engine)


async def test_a_look_is_one_statement_and_calls_for_the_steps_that_are_due(settings: Settings) -> None:
    called: list[frozenset[str]] = []
    async with a_work(settings) as work:
        watch = Watch(work.settings.worker.lease, longest_gap=work.settings.worker.sweep)
        with statements_of(work.processor) as sent:
            await _rescuer(work, watch, called.append).look(work.processor)

    assert called == [{"prune", "relay"}]
    assert len(sent) == 1


async def _rescue_dead(work: Any) -> None:
    watch = Watch(timedelta(0), timedelta(hours=1))  # whoever is seen is dead; the rescuer leaves itself out
    await _rescuer(work, watch).look(work.processor)


def _rescuer(work: Any, watch: Watch, due: Callable[[frozenset[str]], None] = lambda _: None) -> Rescuer:
    return Rescuer(
        work.identity,
        watch,
        lease=work.settings.worker.lease,
        sweep=work.settings.worker.sweep,
        max_crashes=work.settings.jobs.max_crashes,
        moved=lambda moved: publish_moved(work, moved),
        due=due,
    )


async def _rescue_only(work: Any, dead: Any) -> None:
    class Only(Watch):
        def look(self, beats: Any, now: float) -> Any:
            return {dead: beats[dead]} if dead in beats else {}

    await _rescuer(work, Only(timedelta(0), timedelta(0))).look(work.processor)


async def _a_worker_row(engine: AsyncEngine, *, stopping: bool = False) -> Any:
    worker_id = uuid4()
    async with engine.begin() as connection:
        await worker_rows.register(connection, worker_id, queues=["default"], concurrency=1)
        if stopping:
            await worker_rows.announce_stop(connection, worker_id)
    return worker_id


async def _connected_as(engine: AsyncEngine, worker_id: Any) -> int:
    async with engine.connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = :name"
        return int((await connection.execute(text(query), {"name": f"exarq {worker_id}"})).scalar_one())


async def _beats(engine: AsyncEngine) -> dict[Any, int]:
    async with engine.connect() as connection:
        found = await connection.execute(text("SELECT id, beat FROM exarq.worker"))
        return dict(found.all())


async def _all_beat_again(engine: AsyncEngine, before: dict[Any, int]) -> bool:
    now = await _beats(engine)
    return all(now.get(id_, beat + 1) > beat for id_, beat in before.items())


async def _count(found: Any, wanted: int) -> bool:
    return len(await found) == wanted


async def _is(engine: AsyncEngine, job: Any, wanted: str) -> bool:
    return await state(engine, job) == wanted


async def _all_are(engine: AsyncEngine, found: list[Any], wanted: str) -> bool:
    return {await state(engine, job) for job in found} == {wanted}


async def _ended_or_failed(worker: Any, engine: AsyncEngine, poison: Any) -> bool:
    return worker.is_over or await _is(engine, poison, "failed")
