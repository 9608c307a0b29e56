"""From runs to rows, ratios and verdicts."""

from __future__ import annotations

import pytest

from tests.bench.measure import Run
from tests.bench.rows import Ratio, percentile, ratio, row
from tests.bench.servers import Counters
from tests.bench.targets import Field, judge, rate_of
from tests.bench.workloads import WORKLOADS, jobs_for


def a_run(rate: float, *, jobs: int = 100, cpu: float = 1.0, by_hand: Run | None = None) -> Run:
    return Run(jobs=jobs, seconds=jobs / rate, cpu=cpu, by_hand=by_hand)


def test_a_row_has_the_medians_and_the_spread() -> None:
    counted = Counters(wal_bytes=50_000, commits=110, redis_commands=500)
    runs = [Run(jobs=100, seconds=100 / rate, cpu=0.1, memory_mb=80, cost=counted) for rate in (90, 100, 130)]

    assert row("exarq", "1", "orm", 1, runs) == {
        "system": "exarq",
        "version": "1",
        "workload": "orm",
        "processes": 1,
        "jobs": 100,
        "jobs_per_s": 100,
        "p50_ms": None,
        "p99_ms": None,
        "cpu_s_per_1000": 1.0,
        "wal_bytes_per_job": 500,
        "commits_per_job": 1.1,
        "redis_commands_per_job": 5,
        "rss_mb": 80,
        "runs": 3,
        "spread": 0.4,
    }


def test_a_row_of_latencies_has_the_percentiles_of_all_runs_and_no_rate() -> None:
    runs = [Run(jobs=2, latencies=[1.0, 2.0]), Run(jobs=2, latencies=[3.0, 40.0])]

    found = row("exarq", "1", "latency", 1, runs)

    assert (found["jobs_per_s"], found["p50_ms"], found["p99_ms"], found["cpu_s_per_1000"]) == (None, 3.0, 40.0, None)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 3), (0.99, 4), (1.0, 4)])
def test_a_percentile_is_one_of_the_values(share: float, expected: float) -> None:
    assert percentile([4, 1, 3, 2], share) == expected


def test_a_ratio_is_taken_within_each_round_and_only_where_both_ran() -> None:
    ours = {0: a_run(100), 1: a_run(300), 2: a_run(1)}
    theirs = {0: a_run(50), 1: a_run(100), 3: a_run(1)}

    assert ratio(ours, theirs, rate_of) == Ratio(median=2.5, least=2.0, most=3.0, pairs=2)
    assert ratio(ours, {}, rate_of) is None


def test_each_target_is_met_or_not_by_the_median_of_its_pairs() -> None:
    runs = {
        ("exarq", "noop"): {0: a_run(500), 1: a_run(600)},
        ("arq", "noop"): {0: a_run(100), 1: a_run(100)},
        ("pgqueuer", "noop"): {0: a_run(550), 1: a_run(550)},
        ("exarq", "orm"): {0: a_run(95, cpu=1.0)},
        ("limit", "orm"): {0: a_run(99, cpu=0.9)},
        ("exarq", "enqueue"): {0: a_run(100, by_hand=a_run(125))},
        ("exarq", "enqueue_many"): {0: a_run(39_999)},
        ("exarq", "latency"): {0: Run(jobs=2, latencies=[5.0, 5.5, 13.0])},
        ("pgqueuer", "latency"): {0: Run(jobs=2, latencies=[4.0, 4.2, 90.0])},
    }
    field = Field(lambda system, key: runs.get((system, key), {}), ("arq", "pgqueuer"), ("pgqueuer",))

    found = {(verdict.workload, verdict.target): verdict.met for verdict in judge(field)}

    assert found == {
        ("noop", "≥ 5 × arq"): True,
        ("noop", "≥ 1.25 × the fastest peer (pgqueuer)"): False,
        ("orm", "≥ 1.5 × arq"): None,
        ("orm", "≥ 1.05 × the fastest peer"): None,
        ("orm", "≥ 0.95 × limit"): True,
        ("orm", "CPU: the limit's ≥ 0.95 × ours"): False,
        ("legacy", "≥ 0.95 × limit"): None,
        ("latency", "p50 ≤ 6 ms"): True,
        ("latency", "p50 ≤ 1.25 × the best in PostgreSQL (pgqueuer)"): False,
        ("latency", "p99 ≤ 12 ms"): False,
        ("latency", "p99 below that of pgqueuer"): True,
        ("enqueue", "takes ≤ 1.3 × the INSERT by hand"): True,
        ("enqueue_many", "≥ 40,000 jobs/s into both stores"): False,
        ("wait", "≥ 0.9 × noop"): None,
        ("orm x2", "≥ 1.4 × orm"): None,
        ("noop x2", "≥ 1.15 × noop"): None,
    }


@pytest.mark.parametrize(
    ("rate", "seconds", "expected"), [(800, 3, 2_000), (7_000, 3, 20_000), (99_000, 3, 20_000), (10, 1, 100)]
)
def test_a_run_has_as_many_jobs_as_last_about_so_long(rate: float, seconds: float, expected: int) -> None:
    assert jobs_for(WORKLOADS[0], rate, seconds) == expected
