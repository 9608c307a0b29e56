"""What is sent again and again finds its rows by an index, however large the table and whatever is known of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from itertools import product

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.db.plans import HOT, MODES, MOST_SORTED, Hot, Mode, Rows, fill, plans_of
from worker.db import schedules
from worker.db.engine import processor_engine

pytestmark = pytest.mark.leaves_running

# From some 30,000 rows on the planner decides as for millions: `make bench-scale` looks at those.
MIXED = Rows(due=5_000, later=5_000, running=200, final=30_000)
BACKLOG = Rows(due=30_000, later=10_000, running=200, final=10_000)
HISTORY = Rows(due=200, later=200, running=200, final=40_000)
BURST = Rows(due=30_000, running=200)


@pytest.fixture
async def processor(database_url: str) -> AsyncIterator[AsyncEngine]:
    """The engine over which a worker sends its own statements."""
    seconds = timedelta(seconds=30)
    engine = processor_engine(
        database_url,
        application_name=lambda: "exarq test",
        connections=1,
        connect_timeout=seconds,
        statement_timeout=seconds,
    )
    yield engine
    await engine.dispose()


async def analyse(engine: AsyncEngine) -> None:
    async with engine.connect() as plain:
        await (await plain.execution_options(isolation_level="AUTOCOMMIT")).execute(
            text("VACUUM ANALYZE exarq.job, exarq.attempt")
        )


async def _fill(engine: AsyncEngine, rows: Rows) -> None:
    async with engine.begin() as connection:
        await fill(connection, rows)


async def _by_its_index(engine: AsyncEngine, hot: Hot, mode: Mode) -> None:
    plans = await plans_of(engine, mode, hot.send)

    shown = f"{mode} plan of {hot.name}:\n" + "\n".join(map(str, plans))
    assert any(hot.index in plan.indexes for plan in plans), shown
    for plan in plans:
        assert not plan.scanned, f"reads all of {plan.scanned}: {shown}"
        # A plan for any parameters takes a limit for a tenth of the table.
        assert mode == "generic" or plan.sorted <= MOST_SORTED, f"sorts {plan.sorted} rows: {shown}"


@pytest.mark.parametrize("rows", [MIXED, BACKLOG, HISTORY], ids=["mixed", "backlog", "history"])
async def test_what_is_sent_finds_its_rows_by_its_index(
    engine: AsyncEngine, processor: AsyncEngine, rows: Rows
) -> None:
    await _fill(engine, rows)
    await analyse(engine)

    for hot, mode in product(HOT, MODES):
        if hot.by != "person" or rows is not BACKLOG:  # who wants to know of nearly all jobs reads nearly all
            await _by_its_index(processor if hot.by == "worker" else engine, hot, mode)


@pytest.mark.parametrize("before", [Rows(final=30_000), Rows(due=30_000)], ids=["none waited", "all waited"])
async def test_statistics_of_another_hour_lead_nobody_astray(
    engine: AsyncEngine, processor: AsyncEngine, before: Rows
) -> None:
    await _fill(engine, before)
    await analyse(engine)
    await _fill(engine, Rows(running=200, final=30_000) if before.due else BURST)

    for hot, mode in product(HOT, MODES):
        if hot.by != "person":
            await _by_its_index(processor if hot.by == "worker" else engine, hot, mode)


async def test_statistics_taken_in_the_middle_of_a_large_enqueue_lead_nobody_astray(
    engine: AsyncEngine, processor: AsyncEngine
) -> None:
    async with engine.begin() as enqueuing:
        await fill(enqueuing, MIXED)
        await analyse(engine)  # pages without a committed row: the planner believes each table one row long

    for hot, mode in product(HOT, MODES):
        await _by_its_index(processor if hot.by == "worker" else engine, hot, mode)


async def test_a_plan_that_a_worker_keeps_from_an_empty_table_is_by_an_index(processor: AsyncEngine) -> None:
    for hot in HOT:
        if hot.by == "worker":
            await _by_its_index(processor, hot, "generic")


@pytest.mark.parametrize("mode", MODES)
async def test_a_look_at_the_clock_reads_no_schedule_that_ticks_later(mode: Mode, processor: AsyncEngine) -> None:
    look = partial(schedules.look, declared=["tests.noop"], known=["tests.noop"], within=timedelta(seconds=6))

    (plan,) = await plans_of(processor, mode, lambda connection: connection.run_sync(look))

    (read,) = [node for node in plan.nodes if node.get("Relation Name") == "schedule"]
    assert read.get("Index Name") == "schedule_next", plan
    assert "next_at <=" in read.get("Index Cond", ""), plan
