"""The five jobs as an Exarq user writes them: the worker owns the session's transaction."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tests.bench import business
from tests.bench.peer import WAITING
from tests.bench.tally import arrived, began
from worker import JobContext, job


@job
async def noop(_ctx: JobContext, number: int) -> int:
    began()
    return number


@job
async def wait(_ctx: JobContext, number: int) -> int:
    began()
    await asyncio.sleep(WAITING)
    return number


@job
async def latency(_ctx: JobContext, number: int) -> int:
    arrived(number)
    return number


@job
async def orm(session: AsyncSession, number: int) -> int:
    began()
    return await business.write(session, number)


@job
def legacy(session: Session, number: int) -> int:
    began()
    return business.post(session, number)


JOBS: dict[str, Any] = {"noop": noop, "orm": orm, "legacy": legacy, "latency": latency, "wait": wait}
