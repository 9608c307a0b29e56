"""`exarq prune`: delete old finished jobs now, as the workers do by and by."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from worker.cli.ask import confirm
from worker.cli.database import migrated_database
from worker.cli.options import age
from worker.cli.output import print_json, print_line, progress
from worker.core.errors import ArgumentsInvalid
from worker.core.states import FINAL, JobState
from worker.db import choose, transitions
from worker.db.choose import Filters
from worker.settings import Settings, load_settings
from worker.settings.values import HOUR

_BATCH: Final = 1_000


def prune_now(*, state: str | None, older_than: str | None, yes: bool, as_json: bool) -> None:
    """Delete what is older than the settings keep it, or than somebody says, and print how many jobs went."""
    if state is not None and state not in {str(one) for one in FINAL}:
        raise ArgumentsInvalid(f"only what has ended is pruned: --state is one of {', '.join(sorted(FINAL))}")
    limit = age(older_than)
    if limit is not None and limit < HOUR:
        raise ArgumentsInvalid("nothing younger than an hour is pruned: an attempt may still ask how its job ended")
    settings = load_settings()
    states = sorted(FINAL) if state is None else [JobState(state)]
    keep = {one: getattr(settings.keep, one) if limit is None else limit for one in states}
    pruned = asyncio.run(_prune(settings, keep, asks=limit is not None, yes=yes))
    if as_json:
        print_json({"pruned": pruned})
    else:
        print_line(", ".join(f"{count:,} {one}" for one, count in pruned.items()) + " pruned")


async def _prune(settings: Settings, keep: Mapping[JobState, timedelta], *, asks: bool, yes: bool) -> dict[str, int]:
    async with migrated_database(settings) as engine:
        old = await _count(engine, keep)
        if asks and old:
            confirm(f"prune {old:,} jobs?", yes=yes)
        pruned: dict[str, int] = {}
        with progress("prune jobs", old) as advance:
            for state, length in keep.items():
                pruned[state] = 0
                while True:
                    async with engine.begin() as connection:
                        count = await transitions.prune(connection, state, keep=length, batch=_BATCH)
                    pruned[state] += count
                    advance(count)
                    if count < _BATCH:
                        break
        return pruned


async def _count(engine: AsyncEngine, keep: Mapping[JobState, timedelta]) -> int:
    async with AsyncSession(engine) as session:
        counts = [await choose.count(session, [state], Filters(older_than=length)) for state, length in keep.items()]
    return sum(counts)
