"""From runs to rows and ratios: medians, spreads, percentiles. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from tests.bench.measure import Run

Value = Callable[[Run], float | None]


class Ratio(NamedTuple):
    """The ratios of pairs, each taken within one round."""

    median: float
    least: float
    most: float
    pairs: int


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that this share of them does not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else None


def middle(runs: Sequence[Run], value: Value) -> float | None:
    """The median of what the runs have of it; None where none has."""
    found = [number for run in runs if (number := value(run)) is not None]
    return median(found) if found else None


def row(system: str, version: str, workload: str, processes: int, runs: Sequence[Run]) -> dict[str, Any]:
    """One line of `.bench/latest.jsonl`."""
    latencies = [took for run in runs for took in run.latencies]
    main = [p50 for run in runs if (p50 := percentile(run.latencies, 0.5))] or [r for run in runs if (r := run.rate)]
    return {
        "system": system,
        "version": version,
        "workload": workload,
        "processes": processes,
        "jobs": runs[0].jobs,
        "jobs_per_s": _rounded(middle(runs, lambda run: run.rate), 1),
        "p50_ms": _rounded(percentile(latencies, 0.5), 2),
        "p99_ms": _rounded(percentile(latencies, 0.99), 2),
        "cpu_s_per_1000": _rounded(middle(runs, lambda run: None if run.cpu is None else run.cpu / run.jobs * 1000), 4),
        "wal_bytes_per_job": _rounded(middle(runs, lambda run: run.cost and _each(run, run.cost.wal_bytes)), 0),
        "commits_per_job": _rounded(middle(runs, lambda run: run.cost and _each(run, run.cost.commits)), 3),
        "redis_commands_per_job": _rounded(
            middle(runs, lambda run: run.cost and _each(run, run.cost.redis_commands)), 3
        ),
        "rss_mb": _rounded(middle(runs, lambda run: run.memory_mb), 1),
        "runs": len(runs),
        "spread": _rounded((max(main) - min(main)) / median(main), 3) if main else None,
    }


def ratio(ours: Mapping[int, Run], theirs: Mapping[int, Run], value: Value) -> Ratio | None:
    """Ours as a multiple of theirs, round by round; None where they share no round."""
    pairs = [(value(ours[number]), value(theirs[number])) for number in sorted(ours.keys() & theirs.keys())]
    found = [one / other for one, other in pairs if one is not None and other]
    return Ratio(median(found), min(found), max(found), len(found)) if found else None


def _each(run: Run, total: float) -> float:
    return total / run.jobs


def _rounded(value: float | None, digits: int) -> float | None:
    if value is None:
        return None
    return round(value, digits) if digits else round(value)
