"""How fast Exarq shall be, and whether this run shows it. Pure; nothing ever fails because of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tests.bench.measure import Run
from tests.bench.rows import Ratio, Value, middle, percentile, ratio
from tests.bench.workloads import EXARQ, LIMIT

Runs = Mapping[int, Run]
Lookup = Callable[[str, str], Runs]
"""The runs of a system and a workload, by round; none where there are none."""

_NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Verdict:
    """One target: met or not with these figures; None where this run did not measure it."""

    workload: str
    target: str
    found: str
    met: bool | None


@dataclass(frozen=True)
class Field:
    """Who took part.

    Args:
        of: their runs.
        peers: the names of the other systems, without the limit.
        in_postgres: those of them whose jobs live in PostgreSQL.

    """

    of: Lookup
    peers: tuple[str, ...]
    in_postgres: tuple[str, ...]

    def best(self, names: tuple[str, ...], workload: str, value: Value, *, least: bool = False) -> str | None:
        """Who of these has the highest, or the least, median."""
        medians = {name: middle(list(self.of(name, workload).values()), value) for name in names}
        found = {name: number for name, number in medians.items() if number is not None}
        return (min if least else max)(found, key=lambda name: found[name]) if found else None


def judge(field: Field) -> list[Verdict]:
    """Every target that a run of the bench can show."""
    return [
        _times(field, "noop", "arq", 5),
        _times(field, "noop", field.best(field.peers, "noop", rate_of), 1.25, "the fastest peer"),
        _times(field, "orm", "arq", 1.5),
        _times(field, "orm", field.best(field.peers, "orm", rate_of), 1.05, "the fastest peer"),
        _times(field, "orm", LIMIT, 0.95),
        _less_cpu_than_limit(field, "orm", 0.95),
        _times(field, "legacy", LIMIT, 0.95),
        *_latency(field),
        _beside_by_hand(field.of(EXARQ, "enqueue")),
        _absolute(field.of(EXARQ, "enqueue_many"), 40_000),
        _self(field, "wait", "noop", 0.9),
        _self(field, "orm x2", "orm", 1.4),
        _self(field, "noop x2", "noop", 1.15),
    ]


def rate_of(run: Run) -> float | None:
    """Jobs a second."""
    return run.rate


def cpu_of(run: Run) -> float | None:
    """Seconds of CPU of one job."""
    return None if run.cpu is None else run.cpu / run.jobs


def percentile_of(run: Run, share: float) -> float | None:
    """A percentile of the latencies, ms."""
    return percentile(run.latencies, share)


def _times(field: Field, workload: str, other: str | None, least: float, called: str = "") -> Verdict:
    target = f"≥ {least:g} × {called or other or 'the fastest peer'}"
    if other is None:
        return Verdict(workload, target, _NOT_MEASURED, None)
    named = f"{target} ({other})" if called else target
    return _at_least(workload, named, ratio(field.of(EXARQ, workload), field.of(other, workload), rate_of), least)


def _self(field: Field, workload: str, other: str, least: float) -> Verdict:
    found = ratio(field.of(EXARQ, workload), field.of(EXARQ, other), rate_of)
    return _at_least(workload, f"≥ {least:g} × {other}", found, least)


def _less_cpu_than_limit(field: Field, workload: str, least: float) -> Verdict:
    found = ratio(field.of(LIMIT, workload), field.of(EXARQ, workload), cpu_of)
    return _at_least(workload, f"CPU: the limit's ≥ {least:g} × ours", found, least)


def _latency(field: Field) -> list[Verdict]:
    p50, p99 = partial(percentile_of, share=0.5), partial(percentile_of, share=0.99)
    runs = field.of(EXARQ, "latency")
    best = field.best(field.in_postgres, "latency", p50, least=True)
    verdicts = [_at_most("latency", "p50 ≤ 6 ms", middle(list(runs.values()), p50), 6)]
    if best:
        target = f"p50 ≤ 1.25 × the best in PostgreSQL ({best})"
        verdicts.append(_ratio_at_most("latency", target, ratio(runs, field.of(best, "latency"), p50), 1.25))
    verdicts.append(_at_most("latency", "p99 ≤ 12 ms", middle(list(runs.values()), p99), 12))
    for name in field.in_postgres:
        found = ratio(runs, field.of(name, "latency"), p99)
        if found is not None:
            verdicts.append(_ratio_at_most("latency", f"p99 below that of {name}", found, 1))
    return verdicts


def _beside_by_hand(runs: Runs) -> Verdict:
    by_hand = {number: run.by_hand for number, run in runs.items() if run.by_hand}
    found = ratio(runs, by_hand, lambda run: run.seconds)
    return _ratio_at_most("enqueue", "takes ≤ 1.3 × the INSERT by hand", found, 1.3)


def _absolute(runs: Runs, least: float) -> Verdict:
    found = middle(list(runs.values()), rate_of)
    target = f"≥ {least:,.0f} jobs/s into both stores"
    said = _NOT_MEASURED if found is None else f"{found:,.0f}"
    return Verdict("enqueue_many", target, said, None if found is None else found >= least)


def _at_least(workload: str, target: str, found: Ratio | None, least: float) -> Verdict:
    return Verdict(workload, target, _said(found), None if found is None else found.median >= least)


def _ratio_at_most(workload: str, target: str, found: Ratio | None, most: float) -> Verdict:
    return Verdict(workload, target, _said(found), None if found is None else found.median <= most)


def _at_most(workload: str, target: str, found: float | None, most: float) -> Verdict:
    said = _NOT_MEASURED if found is None else f"{found:.1f} ms"
    return Verdict(workload, target, said, None if found is None else found <= most)


def _said(found: Ratio | None) -> str:
    if found is None:
        return _NOT_MEASURED
    return f"{found.median:.2f} ({found.least:.2f} to {found.most:.2f} in {found.pairs} pairs)"
