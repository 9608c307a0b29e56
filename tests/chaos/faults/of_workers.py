"""Workers that die, stand still, block, are replaced, or live by another clock."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text

from tests.chaos import jobs, looks
from tests.chaos.checker import Offence
from tests.chaos.faults import fault
from tests.chaos.processes import Process
from tests.chaos.stage import Stage

KILL_POINTS: Final = {
    "HintsTaken": 3,
    "JobsClaimed": 3,
    "EffectWritten": 9,
    "CommitSending": 9,
    "AttemptEnded": 9,
    "FlushSending": 3,
    "HintsDropping": 3,
    "ReconcileCommitting": 1,
    "RescueCommitting": 1,
    "TickCommitting": 3,
}
"""The events at which a worker kills itself, and how far a run may let it come: at the first up to that number."""


@fault()
async def nothing(stage: Stage) -> None:
    """Nothing breaks for three leases: what the machine can do."""
    await asyncio.sleep(3 * stage.pace.lease)


@fault("workers")
async def kill(stage: Stage) -> None:
    """SIGKILL of one of three workers in the middle of its work."""
    ids = await stage.place(*[jobs.slow.call(stage.pace.lease / 2)] * 30)
    await stage.kill(await one_that_runs(stage, ids))
    await rescued(stage)
    await stage.begun(stage.start_worker())


@fault("workers")
async def kills(stage: Stage) -> None:
    """SIGKILL of a random worker every lease, each replaced at once."""
    for _ in range(3):
        await stage.kill(stage.any_worker())
        process = stage.start_worker()
        await asyncio.sleep(stage.pace.lease)
        await stage.begun(process)


@fault("workers")
async def freeze(stage: Stage) -> None:
    """SIGSTOP of a worker for three leases, then SIGCONT: a zombie that still believes it holds its jobs."""
    lease = stage.pace.lease
    ids = await stage.place(*[jobs.naps.call(lease)] * 15, *[jobs.late.call(lease)] * 15)
    process = await one_that_runs(stage, ids)
    stage.strike(process, signal.SIGSTOP)
    await asyncio.sleep(3 * stage.pace.lease)
    process.send(signal.SIGCONT)
    await asyncio.sleep(stage.pace.lease / 2)


@fault()
async def rolling_restart(stage: Stage) -> None:
    """SIGTERM to one worker after the other, each replaced before it goes."""
    for process in list(stage.workers):
        await stage.begun(stage.start_worker())
        await stage.stop(process)


@fault()
async def kill_points(stage: Stage) -> None:
    """SIGKILL at an event: after the claim in Redis, in SQL, at the effect, around COMMIT, at drop, flush, upkeep."""
    for event, most in KILL_POINTS.items():
        number = stage.rng.randint(1, most)
        stage.say(f"  a worker that dies at {event}, number {number}")
        process = stage.start_worker(wanted=False, chaos_kill_at=f"{event}:{number}")
        await stage.begun(process)
        if event in ("ReconcileCommitting", "RescueCommitting"):
            await _only(stage, process)
        code = await process.ended(4 * stage.pace.lease + 20)
        if code != -signal.SIGKILL:
            stage.offences.append(Offence("fault_failed", event, f"its worker was not killed there; exit code {code}"))
            await stage.kill(process)


async def _only(stage: Stage, survivor: Process) -> None:
    """Kill all other workers, so that this one has to do their part; they are replaced when it has died of it."""
    others = [process for process in stage.workers if process is not survivor]
    for process in others:
        await stage.kill(process)
    await survivor.ended(4 * stage.pace.lease + 20)
    await stage.begun(*(stage.start_worker() for _ in others))


@fault()
async def poison(stage: Stage) -> None:
    """A job that ends its process, among innocent neighbours; each worker that dies of it is replaced."""
    ids = await stage.place(*(jobs.slow.call(stage.pace.lease / 4) for _ in range(12)), jobs.poison.call())
    await stage.until(
        lambda: looks.have_ended(stage.engine, ids[-1:]), "the poison is failed", 60 * stage.pace.lease + 60
    )


@fault()
async def blocked_loop(stage: Stage) -> None:
    """A job that blocks its worker's loop for six leases in pure Python: the worker is not dead."""
    (job,) = await stage.place(jobs.blocks.call("python", 6 * stage.pace.lease))
    await stage.until(lambda: looks.has_begun(stage.engine, job), "the blocking job begins")
    await asyncio.sleep(6 * stage.pace.lease)
    await stage.until(
        lambda: looks.have_ended(stage.engine, [job]), "the blocking job has ended", 6 * stage.pace.lease + 30
    )


@fault()
async def blocked_gil(stage: Stage) -> None:
    """A job that keeps the GIL in C code for longer than the lease: the worker is given up, and refused later."""
    (job,) = await stage.place(jobs.blocks.call("c", 1.7 * stage.pace.lease))
    await stage.until(lambda: looks.has_begun(stage.engine, job), "the blocking job begins")
    stage.excuse_all()  # whichever has it; the others live through it
    await asyncio.sleep(2 * stage.pace.lease)
    await stage.until(
        lambda: looks.have_ended(stage.engine, [job]), "the blocking job has ended", 6 * stage.pace.lease + 30
    )


@fault()
async def clocks(stage: Stage) -> None:
    """Two workers whose clocks are five minutes ahead and five minutes behind."""
    ahead = stage.start_worker(program=True, wanted=False, **another_clock("+5m"))
    await stage.begun(ahead)
    behind = stage.start_worker(program=True, wanted=False, **another_clock("-5m"))
    await stage.begun(behind)
    shifts = [round(process.noted("clock")[0]["time"] - process.noted("clock")[0]["at"]) for process in (ahead, behind)]
    assert [60 * round(shift / 60) for shift in shifts] == [300, -300], f"their clocks are {shifts} s ahead"
    await asyncio.sleep(1.5 * stage.pace.lease)
    await stage.kill(ahead)
    await rescued(stage)
    await stage.stop(behind)


def another_clock(shift: str) -> dict[str, Any]:
    """The variables that give a program another time of day, and not another monotonic clock: that would be no Linux.

    Not by the command faketime, which stays between us and the worker and would get our signals.
    """
    library = next(_faketime(), None)
    if library is None:
        raise RuntimeError("this fault needs libfaketime: apt-get install faketime")
    return {"ld_preload": library, "faketime": shift, "dont_fake_monotonic": 1}


def has_faketime() -> bool:
    """Whether the library is there that gives a program another clock."""
    return next(_faketime(), None) is not None


def _faketime() -> Iterator[Path]:
    for pattern in ("lib/*/faketime/libfaketimeMT.so.1", "lib/faketime/libfaketimeMT.so.1"):
        for folder in ("/usr", "/usr/local"):
            yield from Path(folder).glob(pattern)


async def one_that_runs(stage: Stage, ids: list[UUID]) -> Process:
    """A worker that runs at least one of these jobs."""

    async def found() -> Process | None:
        holders = await looks.holders(stage.engine, ids)
        held = [process for process in stage.workers if process.runs and process.worker_id in holders]
        return stage.rng.choice(held) if held else None

    process = await stage.until(found, "a worker runs one of them")
    assert isinstance(process, Process)
    return process


async def rescued(stage: Stage) -> None:
    """Return when no worker is left that we have killed."""
    await stage.until(lambda: _nobody_dead(stage), "the jobs of the killed are given back", 6 * stage.pace.lease + 30)


_DEAD = text("SELECT count(*) FROM exarq.worker WHERE id = ANY(:ids)")


async def _nobody_dead(stage: Stage) -> bool:
    gone = [process.worker_id for process in stage.former if process.worker_id and not process.runs]
    async with stage.engine.connect() as connection:
        return not (await connection.execute(_DEAD, {"ids": gone})).scalar_one()
