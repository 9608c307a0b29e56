"""Throughput and latency beside full tables, and under an old snapshot: each as a multiple of the plain run next to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Final

from tests.bench.measure import Run
from tests.bench.processes import BenchError
from tests.bench.rows import Ratio, ratio
from tests.bench.scale.findings import Finding, Findings, of_latencies, of_ratio
from tests.bench.scale.stage import Backlog, Filled, Rig, Stage, async_url, old_snapshot
from tests.bench.targets import rate_of
from tests.db.plans import HOT, MODES, MOST_SORTED, Rows, plans_of
from worker.db.engine import processor_engine

_LEAST: Final = 0.9
_LATENCIES: Final = 100
_CURVE_ROUNDS: Final = 2

Once = Callable[[], Awaitable[Run]]


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Args:
        waiting: jobs that wait, point by point; the last is the target's.
        finished: jobs that have ended, likewise.
        jobs: of one run.
        under_snapshot: of one run while the snapshot is held.
        rounds: pairs at the last point.

    """

    waiting: tuple[int, ...]
    finished: tuple[int, ...]
    jobs: int
    under_snapshot: int
    rounds: int


async def waiting(stage: Stage, findings: Findings, sizes: Sizes) -> None:
    """Jobs that wait and are due in an hour, or are due now."""
    await _curve(stage, findings, sizes, sizes.waiting, "waiting, due later", lambda count: Rows(later=count))
    await _backlog(stage, findings, sizes)


async def finished(stage: Stage, findings: Findings, sizes: Sizes) -> None:
    """Jobs that have ended and are kept."""
    await _curve(stage, findings, sizes, sizes.finished, "finished", lambda count: Rows(final=count))


async def snapshot(stage: Stage, findings: Findings, sizes: Sizes) -> None:
    """A transaction that has been open since before the first of these jobs, beside a peer that scans."""
    ours = await stage.rig()
    case = f"old snapshot over {sizes.under_snapshot:,} jobs"
    await _under_snapshot(ours, "exarq", case, sizes, findings, sizes.rounds, _LEAST)
    try:
        peer = await stage.rig("pgqueuer")
        await _under_snapshot(peer, "pgqueuer", case, sizes, findings, _CURVE_ROUNDS, None)
    except (BenchError, TimeoutError) as error:
        findings.add(Finding("scale", case, "pgqueuer", 0, note=f"not measured: {error or type(error).__name__}"))


async def _under_snapshot(
    rig: Rig, name: str, case: str, sizes: Sizes, findings: Findings, rounds: int, least: float | None
) -> None:
    async def held() -> Run:
        await rig.prepare()
        async with old_snapshot(rig.url):
            return await rig.again("noop", sizes.under_snapshot)

    pairs = await _in_turn(findings, rounds, lambda: rig.once("noop", sizes.under_snapshot), held)
    findings.add(*of_ratio("scale", case, f"{name}: noop beside the plain run", _ratio(pairs), least))


async def _curve(
    stage: Stage, findings: Findings, sizes: Sizes, points: Sequence[int], what: str, rows: Callable[[int], Rows]
) -> None:
    """Fill the table further and further; at each point a few pairs, at the last as many as the target needs."""
    plain, full = await stage.rig(), await stage.rig_of(Filled)
    for before, count in pairwise((0, *points)):
        case = f"{count:,} {what}"
        findings.say(f"{case}: filling …")
        await full.fill(rows(count - before), after=before)
        last = count == points[-1]
        pairs = await _in_turn(
            findings,
            sizes.rounds if last else _CURVE_ROUNDS,
            lambda: plain.once("noop", sizes.jobs),
            lambda: full.once("noop", sizes.jobs),
        )
        part, least = ("scale", _LEAST) if last else ("curves", None)
        findings.add(*of_ratio(part, case, "noop beside the plain run", _ratio(pairs), least))
        findings.add(*of_latencies("curves", case, await full.once("latency", _LATENCIES)))
    await _plans(full, findings, f"{points[-1]:,} {what}")


async def _backlog(stage: Stage, findings: Findings, sizes: Sizes) -> None:
    """All that wait are due, so each of them has a hint: a run takes its jobs from the head of the queue."""
    plain, full = await stage.rig(), await stage.rig_of(Backlog)
    count = sizes.waiting[-1]
    findings.say(f"{count:,} waiting, due now: filling …")
    await full.pile_up("noop", count)
    pairs = await _in_turn(
        findings, sizes.rounds, lambda: plain.once("noop", sizes.jobs), lambda: full.once("noop", sizes.jobs)
    )
    findings.add(*of_ratio("scale", f"{count:,} waiting, due now", "noop beside the plain run", _ratio(pairs), _LEAST))


async def _in_turn(findings: Findings, rounds: int, plain: Once, other: Once) -> list[tuple[Run, Run]]:
    """So many pairs, after one that is not counted."""
    pairs = []
    for number in range(rounds + 1):
        pair = await plain(), await other()
        findings.say(f"pair {number} of {rounds}: {pair[0].rate or 0:,.0f} and {pair[1].rate or 0:,.0f} jobs/s")
        pairs.append(pair)
    return pairs[1:]


def _ratio(pairs: Sequence[tuple[Run, Run]]) -> Ratio | None:
    return ratio(
        {n: other for n, (_, other) in enumerate(pairs)}, {n: plain for n, (plain, _) in enumerate(pairs)}, rate_of
    )


async def _plans(rig: Rig, findings: Findings, case: str) -> None:
    """Look at the plans of a worker's own statements, as `tests/db/test_plans.py` does with smaller tables."""
    seconds = timedelta(seconds=30)
    engine = processor_engine(
        async_url(rig.url),
        application_name=lambda: "exarq bench",
        connections=1,
        connect_timeout=seconds,
        statement_timeout=seconds,
    )
    wrong = []
    try:
        sent = [hot for hot in HOT if hot.by == "worker"]
        for hot in sent:
            for mode in MODES:
                plans = await plans_of(engine, mode, hot.send)
                by_index = any(hot.index in plan.indexes for plan in plans)
                sorts = mode == "custom" and any(plan.sorted > MOST_SORTED for plan in plans)
                if not by_index or sorts or any(plan.scanned for plan in plans):
                    wrong.append(f"{hot.name} ({mode})")
    finally:
        await engine.dispose()
    note = ", ".join(wrong) or f"{len(sent)} statements"
    findings.add(Finding("scale", case, "a worker's statements that scan or sort", len(wrong), "", "≤", 0, note))
