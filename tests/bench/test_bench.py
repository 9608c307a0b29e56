"""The harness itself, with so few jobs that no figure means anything: what it counts must be there all the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.bench.__main__ import field_of, rows_of, write
from tests.bench.install import Missing, install
from tests.bench.processes import BenchError
from tests.bench.run import run
from tests.bench.screen import Screen
from tests.bench.servers import Servers
from tests.bench.targets import judge
from tests.bench.workloads import SYSTEMS, WORKLOADS, Plan

FIELDS = [
    "system",
    "version",
    "workload",
    "processes",
    "jobs",
    "jobs_per_s",
    "p50_ms",
    "p99_ms",
    "cpu_s_per_1000",
    "wal_bytes_per_job",
    "commits_per_job",
    "redis_commands_per_job",
    "rss_mb",
    "runs",
    "spread",
]

JOBS = 20

LIAR = """
import os

from tests.bench.peer import About, System, serve
from tests.bench.tally import began


class Liar(System):
    about = About("liar", ("pytest",), "", "", "", "nothing", "nowhere", workloads=("orm",))

    async def install(self):
        pass

    async def reset(self):
        pass

    async def enqueue(self, workload, number):
        pass

    async def enqueue_many(self, workload, numbers):
        pass

    async def left(self):
        return 0

    def work(self, workload, concurrency):
        for _ in range(20):
            began()
        os.read(0, 1)


serve(Liar)
"""


@pytest.mark.measures
async def test_a_run_has_a_row_for_each_system_and_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("orm", "latency", "enqueue", "enqueue_many", "noop x2")
    workloads = tuple(workload for workload in WORKLOADS if workload.key in wanted)
    shutil.copytree(SYSTEMS, folder := tmp_path / "systems")
    (folder / "liar.py").write_text(LIAR)
    plan = Plan(("exarq", "limit", "liar"), workloads, rounds=1, pairs=1, seconds=1, jobs=JOBS, folder=folder)

    results = await run(plan, screen := Screen())
    rows = rows_of(results)
    write(rows, tmp_path / "latest.jsonl", tmp_path / "bench.svg")
    screen.conclude(results, rows, judge(field_of(results)))

    lines = [json.loads(line) for line in (tmp_path / "latest.jsonl").read_text().splitlines()]
    assert all(list(line) == FIELDS for line in lines)
    by_row = {(line["system"], line["workload"], line["processes"]): line for line in lines}
    assert by_row.keys() == {
        ("exarq", "orm", 1),
        ("limit", "orm", 1),
        ("exarq", "latency", 1),
        ("exarq", "enqueue", 1),
        ("by hand", "enqueue", 1),
        ("exarq", "enqueue_many", 1),
        ("exarq", "noop", 2),
    }, capsys.readouterr().out
    for name in ("exarq", "limit"):
        _is_measured(by_row[name, "orm", 1])
    assert 0 < by_row["exarq", "latency", 1]["p50_ms"] <= by_row["exarq", "latency", 1]["p99_ms"]
    assert by_row["exarq", "noop", 2]["redis_commands_per_job"] > 0
    assert "<svg" in (tmp_path / "bench.svg").read_text()
    assert results.measured["liar", "orm"].failed == "it says that 20 jobs have ended, and 0 have written their line"


def _is_measured(line: dict[str, Any]) -> None:
    assert line["jobs"] == JOBS
    assert line["jobs_per_s"] > 0
    assert line["cpu_s_per_1000"] is None or 0 < line["cpu_s_per_1000"] < 1000  # None where the system does not tell
    assert line["wal_bytes_per_job"] > 100
    assert line["commits_per_job"] >= 1
    assert line["runs"] == 1


async def test_nothing_is_measured_on_a_server_that_may_lose_what_it_committed(
    engine: AsyncEngine, database_url: str, redis_url: str
) -> None:
    async with engine.begin() as connection:
        name = (await connection.execute(text("SELECT current_database()"))).scalar_one()
        await connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))

    with pytest.raises(BenchError, match="may lose what it committed"):
        async with Servers(database_url, redis_url, private=False).opened():
            pass


async def test_a_redis_that_holds_something_is_refused_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, database_url: str, redis: ArqRedis, redis_url: str
) -> None:
    monkeypatch.setattr("tests.bench.servers._DURABLE", ())  # the servers of the tests are not
    await redis.set("somebody's", "key")

    with pytest.raises(BenchError, match="is not empty"):
        async with Servers(database_url, redis_url, private=False).opened():
            pass

    assert await redis.get("somebody's") == b"key"


async def test_a_system_that_does_not_install_is_reported(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('it needs a compiler')\n")

    assert await install("broken", tmp_path) == Missing("broken", "it needs a compiler")
