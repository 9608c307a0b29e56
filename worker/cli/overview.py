"""`exarq queues` and `exarq workers`: how much waits and runs, and who is there to work."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any, Final

from arq.connections import ArqRedis
from rich.text import Text

from worker.addresses import redis_url
from worker.broker.connection import UNREACHABLE, connect
from worker.broker.keys import lane_key
from worker.cli.database import migrated_database
from worker.cli.output import Column, ago, length, note, print_json, print_table, short
from worker.core.errors import SettingsError
from worker.core.priority import PRIORITIES
from worker.db import overview
from worker.db.overview import QueueLine, WorkerLine
from worker.settings import Settings, load_settings

_STANDINGS: Final = {"alive": "green", "stopping": "yellow", "dead": "bold red"}


def print_queues(*, as_json: bool) -> None:
    """Print each queue in which something waits, runs or has ended within the hour, or that a living worker serves."""
    lines, hints = asyncio.run(_queues(load_settings()))
    if as_json:
        print_json([_queue_json(line, hints.get(line.queue)) for line in lines])
    elif lines:
        names = ("queue", "waiting", "oldest", "scheduled", "retrying", "running", "hints", "workers")
        print_table([Column(name) for name in names], [_queue_row(line, hints) for line in lines], last="done in 1 h")
    if not lines:
        note("no job waits, none has ended within the last hour, and no worker is there")
    for line in lines:
        if line.waiting + line.retrying and not line.workers:
            note(f"no living worker takes from {line.queue!r}; start one with `exarq run --queue {line.queue}`")


async def _queues(settings: Settings) -> tuple[list[QueueLine], Mapping[str, int | None]]:
    async with migrated_database(settings) as engine, engine.connect() as connection:
        found = await overview.queues(connection, lease=settings.worker.lease)
    return list(found.values()), await _hints(settings, found)


async def _hints(settings: Settings, queues: Collection[str]) -> dict[str, int | None]:
    """How many hints Redis holds of each queue; none is known without Redis, or where the key is another's."""
    try:
        redis: ArqRedis = connect(redis_url(settings), timeout=settings.redis.timeout)
    except SettingsError:
        return {}
    try:
        async with redis.pipeline(transaction=False) as pipe:
            for queue in queues:
                for priority in PRIORITIES:
                    pipe.zcard(lane_key(queue, priority))
            counts = await pipe.execute(raise_on_error=False) if queues else []
    except UNREACHABLE as error:
        note(f"Redis does not answer ({type(error).__name__}: {error}), so its hints are not known")
        return {}
    finally:
        await redis.aclose()
    lanes = iter(counts)
    found = {queue: [next(lanes) for _ in PRIORITIES] for queue in queues}
    return {queue: sum(all_) if all(isinstance(one, int) for one in all_) else None for queue, all_ in found.items()}


def _queue_json(line: QueueLine, hints: int | None) -> dict[str, Any]:
    oldest = line.oldest_due.total_seconds() if line.oldest_due is not None else None
    done = {state: line.done.get(state, 0) for state in ("succeeded", "failed", "cancelled")}
    return {**dataclasses.asdict(line), "oldest_due": oldest, "done": done, "hints": hints}


def _queue_row(line: QueueLine, hints: Mapping[str, int | None]) -> list[str | Text]:
    hinted = hints.get(line.queue)
    nobody = line.waiting + line.retrying > 0 and not line.workers
    done = ", ".join(f"{count:,} {state}" for state, count in sorted(line.done.items(), reverse=True))
    return [
        line.queue,
        f"{line.waiting:,}",
        length(line.oldest_due) if line.oldest_due is not None else "–",
        f"{line.scheduled:,}",
        f"{line.retrying:,}",
        f"{line.running:,}",
        "?" if hinted is None else f"{hinted:,}",
        Text(str(line.workers), style="bold red" if nobody else ""),
        done or "0",
    ]


def print_workers(*, as_json: bool) -> None:
    """Print each worker that has a row; one that is silent for longer than a lease is dead."""
    settings = load_settings()
    lines = asyncio.run(_workers(settings))
    standings = [standing(line, settings.worker.lease) for line in lines]
    if as_json:
        rows = [{**dataclasses.asdict(line), "silent_for": line.silent_for.total_seconds()} for line in lines]
        print_json([{**row, "standing": how} for row, how in zip(rows, standings, strict=True)])
    elif lines:
        names = ("id", "standing", "pid", "running", "of", "started", "last beat", "host")
        columns = [Column(name, folds=name == "host") for name in names]
        shown = [_worker_row(line, how) for line, how in zip(lines, standings, strict=True)]
        print_table(columns, shown, last="queues")
    else:
        note("no worker is there; start one with `exarq run`")
    if "dead" in standings:
        note("what a dead worker has left running is given back by another, as soon as one is there")


async def _workers(settings: Settings) -> list[WorkerLine]:
    async with migrated_database(settings) as engine, engine.connect() as connection:
        return await overview.workers(connection)


def standing(line: WorkerLine, lease: timedelta) -> str:
    """Whether a worker is alive, stopping, or dead."""
    if line.silent_for > lease:
        return "dead"
    return "stopping" if line.stopping_at is not None else "alive"


def _worker_row(line: WorkerLine, how: str) -> list[str | Text]:
    return [
        short(line.id),
        Text(how, style=_STANDINGS[how]),
        str(line.pid),
        str(line.running),
        str(line.concurrency),
        ago(line.started_at),
        f"{length(max(line.silent_for, timedelta(0)))} ago",
        line.host,
        ", ".join(line.queues),
    ]
