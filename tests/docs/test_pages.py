"""What the pages below docs/ print, run as printed by who has followed the README."""

from __future__ import annotations

import json
import re
import subprocess
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.docs.helpers import EXAMPLES, environment, started
from tests.docs.pages import DOCS, README, Reader, blocks, commands
from tests.servers import TestServers
from tests.support import a_job
from worker.db.models import Attempt

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine

TWO_SECONDS = timedelta(seconds=2)


async def test_the_schedules(engine: AsyncEngine, reader: Reader) -> None:
    declared, script = blocks(DOCS / "schedules.md", "python")
    reader.write(declared)
    reader.write(script)
    reader.types("exarq run --burst")  # what the code declares is there once a worker has started

    for command in commands(blocks(DOCS / "schedules.md", "sh")[0]):
        reader.types(command)
    said = reader.types("python reminders.py").splitlines()
    found = json.loads(reader.types("exarq schedules list --json"))

    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d", said[0])
    assert said[1] == "['app.charge', 'app.close_day', 'app.look_around', 'reminder'] app.charge"
    assert [(one["name"], one["state"], one["timezone"]) for one in found] == [
        ("app.charge", "active", "America/New_York"),
        ("app.close_day", "paused", "Europe/Berlin"),
        ("app.look_around", "active", None),
    ]
    async with engine.connect() as connection:
        query = text("SELECT name FROM exarq.job")
        assert (await connection.execute(query)).scalars().all() == ["app.charge", "app.charge"]


async def test_the_job_with_a_context(reader: Reader, tmp_path: Path) -> None:
    reader.write(blocks(DOCS / "jobs.md", "python")[0])
    running, calling = commands(blocks(DOCS / "jobs.md", "sh")[0])
    shell = {**reader.environment, "EXARQ_JOBS_MODULES": "export"}

    async with started(
        running.split(), tmp_path / "log", shell, ready="worker started", folder=reader.folder
    ) as worker:
        assert reader.types(calling) == "export.copy 3"

    assert [json.loads(line)["outcome"] for line in worker.output.splitlines() if "attempt ended" in line] == [
        "snoozed",
        "succeeded",
    ]


async def test_the_ways_to_enqueue(engine: AsyncEngine, reader: Reader) -> None:
    reader.write(blocks(DOCS / "enqueue.md", "python")[0])

    said = reader.types("python orders.py").splitlines()
    async with engine.connect() as connection:
        query = text("SELECT coalesce(unique_key, queue), priority FROM exarq.job ORDER BY 1, 2")
        found = [tuple(row) for row in await connection.execute(query)]

    assert said == ["created exists True", "cancelled", "retried", "True"]
    assert found == [("default", 0), *[("default", 5)] * 5, ("invoice-1", 5), ("slow", 5)]


async def test_the_enqueue_by_sql(engine: AsyncEngine) -> None:
    (sql,) = blocks(DOCS / "enqueue.md", "sql")

    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.execute(sql)
        found = (await connection.execute(text("SELECT name, args, unique_key, priority FROM exarq.job"))).all()

    assert [tuple(row) for row in found] == [("app.charge", {"invoice_id": 1}, "invoice-1", 0)]


async def test_the_look_for_what_held_the_loop(engine: AsyncEngine) -> None:
    job = await a_job(engine, name="app.charge")
    (sql,) = blocks(DOCS / "legacy.md", "sql")

    async with engine.begin() as connection:
        kept = insert(Attempt).values(job_id=job, token=uuid4(), number=1, ending="succeeded", blocked=TWO_SECONDS)
        await connection.execute(kept)
        found = (await connection.execute(text(sql))).all()

    assert [tuple(row) for row in found] == [("app.charge", TWO_SECONDS)]


def test_the_tests(servers: TestServers, tmp_path: Path) -> None:
    reader = Reader(tmp_path, environment("", ""))
    reader.write(blocks(README, "python")[0])
    reader.write(blocks(README, "python")[-1])
    reader.write(blocks(DOCS / "testing.md", "python")[0])
    address = servers.admin_url.render_as_string(hide_password=False)
    shell = {name: value for name, value in reader.environment.items() if not name.startswith("EXARQ_")}

    done = subprocess.run(
        ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:valkey"],
        cwd=tmp_path,
        env={**shell, "EXARQ_TEST_DATABASE_URL": address},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert "5 passed" in done.stdout, done.stdout + done.stderr


def test_the_page_names_every_example() -> None:
    page = (DOCS / "enqueue.md").read_text(encoding="utf-8")

    for example in EXAMPLES.iterdir():
        assert f"(examples/{example.name}" in page
