"""What workers cost that have nothing to do."""

from __future__ import annotations

import asyncio
import time
from typing import Final, NamedTuple

from tests.bench.processes import Workers
from tests.bench.scale.findings import Finding, Findings
from tests.bench.scale.stage import Rig, Stage
from tests.bench.scale.wire import Wire, counted

_MANY: Final = 3
SETTLING: Final = 6.0  # two sweeps: what is done once at the start is over


class _Reading(NamedTuple):
    """Counters at one moment."""

    at: float
    cpu: float
    statements: int
    redis_commands: int
    turns: int


async def idle(stage: Stage, findings: Findings, seconds: float) -> None:
    """One idle worker, then several: by itself each costs next to nothing, and upkeep is done once for all."""
    rig = await stage.rig()
    turns = [await _of(rig, findings, processes, seconds) for processes in (1, _MANY)]
    note = f"{turns[1]:g} a minute with {_MANY} workers, {turns[0]:g} with one"
    # A turn more or less falls into the window by chance.
    findings.add(Finding("idle", f"{_MANY} workers", "turns of upkeep beyond one worker's", turns[1] - turns[0],
                         "/min", "≤", 60 / seconds, note))  # fmt: skip


async def _of(rig: Rig, findings: Findings, processes: int, seconds: float) -> float:
    await rig.prepare()
    case = f"{processes} worker{'s' if processes > 1 else ''}, {seconds:g} s"
    async with counted(rig.url) as (wire, url), rig.script.at(url).workers("noop", 20, processes) as workers:
        await rig.started(processes)
        await asyncio.sleep(SETTLING)
        cpu, statements, redis_commands, turns = await watched(rig, wire, workers, seconds)
    findings.add(
        Finding("idle", case, "CPU of a process", cpu / processes * 100, "% of a core", "<", 1),
        Finding("idle", case, "SQL statements of a process", statements / processes, "/s", "≤", 1),
        Finding("idle", case, "Redis commands of a process", redis_commands / processes, "/s", "≤", 2,
                "those inside of scripts too"),
    )  # fmt: skip
    return turns * 60


class Rates(NamedTuple):
    """What idle workers do in a second, all together; `cpu` is in seconds."""

    cpu: float
    statements: float
    redis_commands: float
    turns: float


async def watched(rig: Rig, wire: Wire, workers: Workers, seconds: float) -> Rates:
    """Look on for so long."""
    before = await _read(rig, wire, workers)
    await asyncio.sleep(seconds)
    after = await _read(rig, wire, workers)
    took = after.at - before.at
    return Rates(*((now - then) / took for now, then in zip(after[1:], before[1:], strict=True)))


async def _read(rig: Rig, wire: Wire, workers: Workers) -> _Reading:
    stats = await rig.redis.info("commandstats")
    asked_by_us = ("cmdstat_info", "cmdstat_select", "cmdstat_client|setinfo")
    commands = sum(one["calls"] for name, one in stats.items() if name not in asked_by_us)
    turns = await rig.sql("SELECT sum(n_tup_upd) FROM pg_stat_user_tables WHERE relname = 'upkeep'")
    return _Reading(time.monotonic(), sum(workers.cpu().values()), wire.statements, commands, int(turns))
