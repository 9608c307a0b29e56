"""The harness of `make bench-scale`: what it counts, what it compares, and a pass so small that no figure means anything."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import asyncpg
import pytest

from tests.bench.processes import BenchError
from tests.bench.rows import Ratio
from tests.bench.scale import ready
from tests.bench.scale.__main__ import Size, run, write
from tests.bench.scale.curves import curves, points
from tests.bench.scale.findings import Finding, Findings, Sense, of_ratio
from tests.bench.scale.full import Sizes
from tests.bench.scale.stage import with_number
from tests.bench.scale.wire import counted
from tests.bench.screen import Screen

SMALL = Size(
    Sizes(waiting=(50,), finished=(50,), jobs=20, under_snapshot=20, rounds=1),
    idle_seconds=0.5, noop_growth=(20, 40), orm_growth=(20, 40), orm=20, rounds=1, processes=(1, 2), workers=(1, 2),
)  # fmt: skip


_IDLE = [f"{what} of a process" for what in ("CPU", "SQL statements", "Redis commands")]
_OF_PROCESSES = [
    *(f"{what}{job}" for job in ("noop", "orm") for what in ("", "a worker's CPU of ", "PostgreSQL's CPU of ")),
    "latency p50",
    "latency p99",
]
_OF_WORKERS = [
    *("SQL statements of all", "Redis commands of all", "CPU of all"),
    *("a worker's CPU of noop", "PostgreSQL's CPU of noop", "jobs of a claim", "SQL statements of 1,000 noop"),
]
FIGURES = {
    "idle": [*_IDLE, *_IDLE, "turns of upkeep beyond one worker's"],
    "finished": [
        "noop beside the plain run",
        "latency p50",
        "latency p99",
        "a worker's statements that scan or sort",
    ],
    "growth": ["growth of VmHWM", "growth of VmHWM"],
    "processes": [*_OF_PROCESSES, *_OF_PROCESSES],
    "workers": [*_OF_WORKERS, *_OF_WORKERS],
}


@pytest.mark.measures
@pytest.mark.timeout(600)  # a dozen processes start one after the other
@pytest.mark.parametrize("part", FIGURES)
async def test_a_part_has_its_figures(part: str, tmp_path: Path) -> None:
    findings = Findings(lambda _: None, lambda _: None)

    failed = await run(SMALL, [part], Screen(), findings)
    write(findings.all, tmp_path / "scale.jsonl", tmp_path / "scale.svg")

    assert failed == []
    lines = [json.loads(line) for line in (tmp_path / "scale.jsonl").read_text().splitlines()]
    assert [line["measure"] for line in lines] == FIGURES[part]
    assert all(line["value"] > 0 for line in lines if "latency" in line["measure"] or "plain run" in line["measure"])


@pytest.mark.parametrize("stop", [8.5, 60.0])
def test_a_stop_that_lasted_longer_than_a_lease_is_told_and_not_measured(stop: float) -> None:
    ready.require_short(1)

    with pytest.raises(BenchError, match=f"stood still for {stop:.1f} s"):
        ready.require_short(stop)


def test_the_picture_has_a_curve_for_each_of_the_four_that_was_found() -> None:
    found = [Finding("curves", f"{count:,} waiting, due later", "noop beside the plain run", 1) for count in (10, 1000)]
    found += [Finding("scale", "50 finished", "noop beside the plain run", 0.95)]
    found += [Finding("curves", case, job, 800) for case in ("1 process", "2 processes") for job in ("noop", "orm")]
    workers = [("1 idle worker", 0.8), ("3 idle workers", 2.4)]
    found += [Finding("curves", case, "SQL statements of all", value) for case, value in workers]

    drawn = ElementTree.fromstring(curves(found) or "")

    words = [word.text for word in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert points(found, "idle worker", "SQL statements of all") == [("1", 0.8), ("3", 2.4)]
    assert [word for word in words if word and "×" in word] == [
        "waiting jobs: jobs/s, × none",
        "finished jobs: jobs/s, × none",
        "processes: jobs/s, × one",
        "workers, × one: SQL/s idle, PostgreSQL's CPU a job",
    ]
    assert {"10", "1,000", "noop 0.95", "orm 1.00", "SQL/s 3.00"} <= set(words)
    assert curves([Finding("idle", "1 worker, 60 s", "CPU of a process", 1)]) is None


async def test_every_statement_that_passes_is_counted_once(database_url: str) -> None:
    async with counted(database_url.replace("+asyncpg", "")) as (wire, url):
        connection = await asyncpg.connect(url)
        connected = wire.statements
        for number in range(3):
            await connection.fetchval("SELECT $1::int", number)
        async with connection.transaction():
            await connection.execute("SELECT 1")
        await connection.close()

    assert wire.statements - connected == 6


@pytest.mark.parametrize(
    ("sense", "value", "met"),
    [("≤", 1.0, True), ("≤", 1.1, False), ("<", 1.0, False), ("<", 0.9, True), ("≥", 1.0, True), ("≥", 0.9, False)],
)
def test_a_figure_is_compared_with_its_target(sense: Sense, value: float, met: bool) -> None:
    assert Finding("idle", "1 worker", "x", value, sense=sense, target=1.0).met is met
    assert Finding("idle", "1 worker", "x", value, sense=sense).met is None


def test_a_ratio_of_no_pairs_is_no_figure() -> None:
    (found,) = of_ratio("scale", "x", "y", Ratio(0.95, 0.8, 1.1, 5), 0.9)

    assert (found.value, found.met, found.note) == (0.95, True, "0.80 to 1.10 in 5 pairs")
    assert of_ratio("scale", "x", "y", None, 0.9) == []


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/7"),
        ("redis://localhost", "redis://localhost/7"),
        ("unix:///tmp/a/redis.sock?db=0", "unix:///tmp/a/redis.sock?db=7"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock?db=7"),
    ],
)
def test_a_rig_has_a_number_of_its_own_in_redis(url: str, wanted: str) -> None:
    assert with_number(url, 7) == wanted
