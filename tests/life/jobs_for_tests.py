"""The jobs that tests run in workers of this process and of others; each effect can be counted afterwards."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from worker.core.context import JobContext
from worker.core.registry import Registry
from worker.flow.enqueue import Call, enqueue_many
from worker.flow.job import job

LINES = "EXARQ_TEST_LINES"
"""The variable that names the file to which jobs add a line as an effect outside the database."""


@job(name="tests.nothing")
async def nothing(ctx: JobContext) -> None:
    """Do nothing, with no connection."""


@job(name="tests.note")
async def note(session: AsyncSession, word: str) -> None:
    """Write one effect."""
    await _write(session, word)


@job(name="tests.slow")
async def slow(ctx: JobContext, word: str, seconds: float) -> None:
    """Take a while without holding the loop, then write one effect."""
    _line(f"began {word}")
    await asyncio.sleep(seconds)
    await _write(ctx.session, word)
    _line(f"ended {word}")


@job(name="tests.exiting")
async def exiting(ctx: JobContext, word: str) -> None:
    """End the program, as far as a task that was started on the side can."""

    async def exit_on_the_side() -> None:
        raise SystemExit(3)

    side = asyncio.create_task(exit_on_the_side())
    await asyncio.wait([side])
    await _write(ctx.session, word)


@job(name="tests.in_a_thread")
async def in_a_thread(ctx: JobContext, seconds: float) -> None:
    """Wait in a thread, which nobody can stop."""
    _line("began in a thread")
    await asyncio.to_thread(time.sleep, seconds)


@job(name="tests.stubborn")
async def stubborn(ctx: JobContext, word: str, seconds: float) -> None:
    """Go on although the worker cancels it."""
    _line(f"began {word}")
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            _line(f"ignored {word}")


@job(name="tests.holding")
async def holding(ctx: JobContext, word: str, seconds: float) -> None:
    """Write first and then, in the first attempt only, keep the transaction open."""
    await _write(ctx.session, f"{word} {ctx.attempt}")
    _line(f"began {word} {ctx.attempt}")
    if ctx.attempt == 1:
        await asyncio.sleep(seconds)


@job(name="tests.blocking")
async def blocking(ctx: JobContext, word: str, seconds: float) -> None:
    """Hold the event loop, in the first attempt only."""
    _line(f"began {word}")
    if ctx.attempt == 1:
        time.sleep(seconds)  # noqa: ASYNC251 — that is what the test is about
    await _write(ctx.session, word)


@job(name="tests.steps", commits="own")
async def steps(session: AsyncSession, count: int, stuck_at: int | None = None) -> int:
    """Write an effect with each commit, from where the first attempt was stuck; returns where that was."""
    begun = int((await session.execute(text("SELECT count(*) FROM effect"))).scalar_one())
    for step in range(begun, count):
        if begun == 0 and step == stuck_at:
            await asyncio.sleep(600)
        await _write(session, f"step {step:03}")
        await session.commit()
        await asyncio.sleep(0.02)
    return begun


@job(name="tests.crash")
async def crash(ctx: JobContext) -> None:
    """End the process it runs in."""
    _line("began crash")
    os._exit(13)


JOBS = (nothing, note, slow, stubborn, holding, blocking, steps, crash)


def registry() -> Registry:
    """These jobs and no others."""
    made = Registry()
    for function in JOBS:
        made.register(function)
    return made


async def enqueue_all(sessions: async_sessionmaker[AsyncSession], *calls: Call) -> list[UUID]:
    """Enqueue in one transaction; returns the ids."""
    async with sessions.begin() as session:
        return [handle.id for handle in await enqueue_many(session, calls)]


async def make_effects(engine: AsyncEngine) -> None:
    """The table that the effects go to."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS effect (word text)"))


async def effects(engine: AsyncEngine) -> list[str]:
    """The effects that are committed, sorted."""
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT word FROM effect ORDER BY word"))).scalars())


def lines(path: Path) -> list[str]:
    """The lines that jobs have added."""
    return path.read_text().splitlines() if path.exists() else []


async def states(engine: AsyncEngine) -> dict[str, int]:
    """How many jobs are in each state."""
    async with engine.connect() as connection:
        found = await connection.execute(text("SELECT state, count(*) FROM exarq.job GROUP BY state"))
        return dict(found.all())


async def rows(engine: AsyncEngine, columns: str = "*") -> list[Any]:
    """The rows of all jobs in the order they were enqueued."""
    async with engine.connect() as connection:
        return list((await connection.execute(text(f"SELECT {columns} FROM exarq.job ORDER BY id"))).all())


async def _write(session: AsyncSession, word: str) -> None:
    await session.execute(text("INSERT INTO effect VALUES (:word)"), {"word": word})


def _line(line: str) -> None:
    if path := os.environ.get(LINES):
        with Path(path).open("a") as file:
            file.write(line + "\n")
