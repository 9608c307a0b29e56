"""`exarq queues`, `workers`, `prune` and `db sql`: what stands where, and the upkeep by hand."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import Command
from tests.support import a_job, state
from worker.db.ids import uuid7

pytestmark = [pytest.mark.leaves_running, pytest.mark.timeout(300)]

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
LEASE = {"EXARQ_WORKER_LEASE": "600"}  # nobody beats here, and a command may take long to start


async def a_worker_row(engine: AsyncEngine, *queues: str, silent_for: str = "0 s", stopping: bool = False) -> UUID:
    worker = uuid7()
    columns = "(id, host, pid, version, queues, concurrency, beat_at, stopping_at)"
    values = "(:id, 'h', 7, '1', :queues, 5, clock_timestamp() - CAST(CAST(:ago AS text) AS interval), :stop)"
    parameters: dict[str, Any] = {"id": worker, "queues": list(queues), "ago": silent_for}
    async with engine.begin() as connection:
        await connection.execute(
            text(f"INSERT INTO exarq.worker {columns} VALUES {values}"),
            {**parameters, "stop": NOW if stopping else None},
        )
    return worker


async def test_each_queue_is_counted_and_one_that_nobody_serves_is_told(exarq: Command, engine: AsyncEngine) -> None:
    await a_worker_row(engine, "day")
    await a_worker_row(engine, "night", silent_for="1 hour")
    exarq("enqueue", "shop.charge", '{"invoice_id": 1}', "--queue", "night")
    await a_job(engine, queue="night", run_at=NOW + HOUR)
    await a_job(engine, queue="night", run_at=NOW + HOUR, failures=1)
    await a_job(engine, queue="night", state="running")
    for ended, finished in (("succeeded", NOW), ("failed", NOW), ("succeeded", NOW - 2 * HOUR)):
        await a_job(engine, queue="day", state=ended, finished_at=finished)

    people, program = exarq.cold("queues", **LEASE), exarq("queues", "--json", **LEASE)

    day, night = program.json
    assert day["done"] == {"succeeded": 1, "failed": 1, "cancelled": 0}
    assert (day["queue"], day["waiting"], day["workers"], day["hints"]) == ("day", 0, 1, 0)
    counted = [night[name] for name in ("waiting", "scheduled", "retrying", "running", "hints", "workers")]
    assert counted == [1, 1, 1, 1, 1, 0]
    assert 0 <= night["oldest_due"] < 300
    header, *lines = people.out.splitlines()
    assert header.split()[:2] == ["queue", "waiting"]
    assert [line.split()[0] for line in lines] == ["day", "night"]
    assert people.out == "".join(f"{line.rstrip()}\n" for line in people.out.splitlines())
    assert people.err == "note: no living worker takes from 'night'; start one with `exarq run --queue night`\n"


async def test_each_worker_is_shown_and_a_silent_one_is_dead(exarq: Command, engine: AsyncEngine) -> None:
    alive, stopping = await a_worker_row(engine, "a", "b"), await a_worker_row(engine, "a", stopping=True)
    dead = await a_worker_row(engine, "a", silent_for="1 hour")
    await a_job(engine, state="running", worker_id=alive)

    people, program = exarq("workers", **LEASE), exarq("workers", "--json", **LEASE)

    found = {line["id"]: (line["standing"], line["running"]) for line in program.json}
    assert found == {str(alive): ("alive", 1), str(stopping): ("stopping", 0), str(dead): ("dead", 0)}
    assert "a, b" in people.out
    assert "dead" in people.out
    assert "given back by another" in people.err


async def test_what_is_old_enough_is_pruned_and_what_is_not_stays(exarq: Command, engine: AsyncEngine) -> None:
    old = await a_job(engine, state="succeeded", finished_at=NOW - timedelta(days=8))
    failed = await a_job(engine, state="failed", finished_at=NOW - timedelta(days=8))
    young = await a_job(engine, state="failed", finished_at=NOW - timedelta(minutes=30))

    by_settings = exarq("prune", "--json")
    unasked = exarq("prune", "--older-than", "7d", "--state", "failed")
    by_age = exarq("prune", "--older-than", "7d", "--state", "failed", "--yes")
    too_young = exarq("prune", "--older-than", "10m", "--yes")

    assert by_settings.json == {"pruned": {"cancelled": 0, "failed": 0, "succeeded": 1}}
    assert unasked.error == "exarq: prune 1 jobs? Nobody can answer without a terminal; say --yes"
    assert by_age.out == "1 failed pruned\n"
    assert "nothing younger than an hour is pruned" in too_young.error
    assert [await state(engine, job) for job in (old, failed, young)] == [None, None, "failed"]


async def test_the_sql_of_the_migrations_makes_what_the_command_would_make(
    exarq: Command, engine: AsyncEngine, database_url: str, tmp_path: Path
) -> None:
    psql = shutil.which("psql")
    already = exarq("db", "sql")
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA exarq CASCADE"))
    wanted = exarq("db", "sql")
    given = exarq("db", "sql", "--from", "base", EXARQ_DATABASE_URL="")
    unknown = exarq("db", "sql", "--from", "nowhere")

    if psql is None:
        async with engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.execute(wanted.out)
    else:
        url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
        command = [psql, "-v", "ON_ERROR_STOP=1", "-q", "-f", "-", url]
        await asyncio.to_thread(subprocess.run, command, input=wanted.out.encode(), check=True, timeout=60)

    assert (already.out, already.code) == ("", 0)
    assert "already at" in already.err
    assert given.out == wanted.out
    assert "no revision 'nowhere'; this version knows base, 0001, 0002, 0003" in unknown.error
    assert exarq("db", "current", "--json").json["up_to_date"]
    assert exarq("enqueue", "shop.charge", '{"invoice_id": 1}').code == 0
