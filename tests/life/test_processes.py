"""`exarq run --processes`: a dead process costs its jobs two seconds, a stop is in order, and nothing is orphaned."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.embedded.helpers import alive
from tests.life import jobs_for_tests as jobs
from tests.processes import parent_process, workers
from tests.support import attempts, row, state, until
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a loaded machine

LEASE = 600  # so that nobody else finds a dead process in time


@pytest.fixture(autouse=True)
async def _effects(engine: AsyncEngine) -> None:
    await jobs.make_effects(engine)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return tmp_path / "lines"


async def pids(engine: AsyncEngine) -> list[int]:
    """The worker processes that are registered."""
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT pid FROM exarq.worker"))).scalars())


async def pid_of(engine: AsyncEngine, job: UUID) -> int:
    """The process in which a job runs."""
    query = text("SELECT pid FROM exarq.worker WHERE id = (SELECT worker_id FROM exarq.job WHERE id = :job)")
    async with engine.connect() as connection:
        return int((await connection.execute(query, {"job": job})).scalar_one())


async def is_(engine: AsyncEngine, job: UUID, wanted: str) -> bool:
    return await state(engine, job) == wanted


async def test_the_jobs_of_a_killed_process_run_again_long_before_its_lease_ends(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    beats = lines.with_name("beats")
    async with parent_process(
        settings, engine, lines=lines, worker_lease=LEASE, worker_heartbeat_folder=beats
    ) as parent:
        # Each process starts anew under another id, which its parent must learn of.
        former = await workers(engine)
        async with engine.begin() as connection:
            await connection.execute(text("DELETE FROM exarq.worker"))
        await until(lambda: _renewed(engine, former), "both workers have new ids")
        (job,) = await jobs.enqueue_all(sessions, jobs.holding.call("work", 60))
        await until(lambda: "began work 1" in jobs.lines(lines), "the job has written")
        killed = await pid_of(engine, job)

        os.kill(killed, signal.SIGKILL)

        await until(lambda: is_(engine, job, "succeeded"), "the job runs in the other process", limit=120)
        await until(lambda: _others(engine, {killed}), "a new process takes the place of the dead one", limit=120)
        files = [f"{parent.pid}-{number}.beat" for number in (1, 2)]
        await until(lambda: sorted(path.name for path in beats.glob("*.beat")) == files, "each has its file")
        (rescued,) = await until(lambda: parent.said("gave back the jobs"), "what it gave back is told")
        (died,) = parent.said("process died")
        parent.send(signal.SIGTERM)
        assert await parent.ended() == 0
    assert (died["pid"], died["how"], died["restart_in"]) == (killed, "SIGKILL", 0.5)
    assert (rescued["pid"], rescued["jobs"]) == (killed, 1)
    assert await jobs.effects(engine) == ["work 2"]
    (attempt,) = await attempts(engine, job)
    assert (attempt.ending, attempt.number) == ("crashed", 1)
    assert f"pid {killed}) died with SIGKILL" in attempt.error
    assert (await row(engine, job)).crashes == 1
    assert await workers(engine) == []
    assert list(beats.iterdir()) == []


async def test_a_signal_lets_what_runs_end_also_when_it_is_sent_to_every_process_at_once(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    async with parent_process(settings, engine, lines=lines, worker_grace=60, worker_concurrency=1) as parent:
        children = await pids(engine)
        both = await jobs.enqueue_all(sessions, jobs.slow.call("a", 1.5), jobs.slow.call("b", 1.5))
        await until(lambda: {"began a", "began b"} <= set(jobs.lines(lines)), "a job runs in each process")

        for pid in children:  # as systemd does; what the parent says then must not be the second signal
            os.kill(pid, signal.SIGTERM)
        parent.send(signal.SIGTERM)

        assert await parent.ended() == 0
    assert [await state(engine, job) for job in both] == ["succeeded", "succeeded"]
    assert not any(map(alive, children))
    assert await workers(engine) == []


async def test_a_second_signal_gives_back_at_once_what_runs(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    async with parent_process(settings, engine, lines=lines, worker_grace=60) as parent:
        (job,) = await jobs.enqueue_all(sessions, jobs.slow.call("long", 60))
        await until(lambda: "began long" in jobs.lines(lines), "the job begins")

        parent.send(signal.SIGINT)
        await until(lambda: len(parent.said("stopping: no more claims")) == 2, "both stop")
        parent.send(signal.SIGINT)

        assert await parent.ended() == 0
    found = await row(engine, job)
    assert (found.state, found.crashes) == ("queued", 0)


async def test_when_the_parent_is_killed_its_processes_stop_in_order(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, lines: Path
) -> None:
    async with parent_process(settings, engine, lines=lines, worker_grace=60) as parent:
        children = await pids(engine)
        (job,) = await jobs.enqueue_all(sessions, jobs.slow.call("last", 1))
        await until(lambda: "began last" in jobs.lines(lines), "the job begins")

        parent.send(signal.SIGKILL)

        await until(lambda: not any(map(alive, children)), "the processes end", limit=90)
    assert await state(engine, job) == "succeeded"
    assert await workers(engine) == []


async def _renewed(engine: AsyncEngine, former: list[Any]) -> bool:
    found = await workers(engine)
    return len(found) == len(former) and not set(found) & set(former)


async def _others(engine: AsyncEngine, gone: set[int]) -> bool:
    found = await pids(engine)
    return len(found) == 2 and not set(found) & gone
