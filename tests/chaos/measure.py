"""Figures of a run: for each fault what was hit, how soon it ran again, and how much work went on meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.chaos import evidence
from tests.chaos.checker import Findings, stale_refused


@dataclass(slots=True)
class Window:
    """When one fault was at work, in seconds since the epoch; calm before `broke` and after `mended`."""

    fault: str
    calm_from: float
    broke: float
    mended: float
    ended: float


@dataclass(slots=True)
class Row:
    """One fault's line in the table."""

    fault: str
    times: int = 0
    jobs: int = 0
    lost: int = 0
    phantoms: int = 0
    repeated: int = 0
    stale_refused: int = 0
    again: list[float] = field(default_factory=list)
    first_back: list[float] = field(default_factory=list)
    start: dict[str, list[float]] = field(default_factory=dict)
    not_enqueued: int = 0
    during: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)


# Jobs that waited or ran at some moment while the fault was at work.
_JOBS: Final = text("""
SELECT count(*) FROM exarq.job
WHERE enqueued_at < :until AND coalesce(finished_at, 'infinity') > :since
""")
_SUCCEEDED: Final = text("SELECT count(*) FROM history WHERE became = 'succeeded' AND at >= :since AND at < :until")

_FIRST: Final = text("SELECT min(at) FROM history WHERE became = 'running' AND at >= :since")

# From the enqueue to the first claim, for jobs that were due at once.
_START: Final = text("""
SELECT extract(epoch FROM claimed.at - job.enqueued_at)::float FROM exarq.job
CROSS JOIN LATERAL (
    SELECT at FROM history WHERE job_id = job.id AND became = 'running' ORDER BY n LIMIT 1) AS claimed
WHERE job.enqueued_at >= :since AND job.enqueued_at < :until
AND job.first_due_at < job.enqueued_at + interval '1 millisecond'
""")

# What was cut short, and when it was claimed next.
_AGAIN: Final = text("""
SELECT cut.worker_id, attempt.started_at, cut.at, next.at FROM history AS cut
JOIN exarq.attempt ON attempt.job_id = cut.job_id AND attempt.token = cut.old_token
CROSS JOIN LATERAL (
    SELECT at FROM history WHERE job_id = cut.job_id AND n > cut.n AND became = 'running' ORDER BY n LIMIT 1) AS next
WHERE cut.was = 'running' AND cut.became = 'queued' AND attempt.ending IN ('crashed', 'released')
""")


async def rows(
    engine: AsyncEngine,
    folder: Path,
    windows: Sequence[Window],
    blows: Sequence[tuple[UUID, float]],
    returns: Sequence[float],
    found: Findings,
) -> list[Row]:
    """One row for each fault, over all the times it struck.

    Args:
        engine: the database, past all proxies.
        folder: where the processes' files are.
        windows: when which fault was at work.
        blows: when which worker was killed or frozen.
        returns: when PostgreSQL, which was away, could be reached again.
        found: what the checker found.

    """
    lines = list(evidence.read(folder))
    by_fault: dict[str, Row] = {}
    async with engine.connect() as connection:
        restarts = [
            _Restart(worker_id, *(moment.timestamp() for moment in moments))
            for worker_id, *moments in await connection.execute(_AGAIN)
        ]
        for window in windows:
            row = by_fault.setdefault(window.fault, Row(window.fault))
            row.times += 1
            _count_lines(row, window, lines)
            _count_offences(row, window, found)
            await _count_work(row, window, connection)
            _count_restarts(row, window, restarts, blows)
            await _count_starts(
                row, window, connection, [back for back in returns if window.broke <= back < window.ended]
            )
    return list(by_fault.values())


def _count_lines(row: Row, window: Window, lines: Sequence[dict[str, Any]]) -> None:
    for line in lines:
        if window.broke <= line["at"] < window.ended:
            row.not_enqueued += line["what"] == "not enqueued"
    row.stale_refused += stale_refused(line for line in lines if window.broke <= line["at"] < window.ended)


def _count_offences(row: Row, window: Window, found: Findings) -> None:
    for offence in found.offences:
        at = _made_at(offence.subject)
        if at is not None and window.calm_from <= at < window.ended:
            row.lost += offence.invariant == "lost"
            row.phantoms += offence.invariant == "phantoms"
            row.repeated += offence.invariant == "repeated_effects"


async def _count_work(row: Row, window: Window, connection: AsyncConnection) -> None:
    async def rate(since: float, until: float) -> float:
        values = {"since": _moment(since), "until": _moment(until)}
        return float((await connection.execute(_SUCCEEDED, values)).scalar_one()) / max(0.1, until - since)

    values = {"since": _moment(window.broke), "until": _moment(window.mended)}
    row.jobs += int((await connection.execute(_JOBS, values)).scalar_one())
    if calm := await rate(window.calm_from, window.broke):
        row.during.append(await rate(window.broke, window.mended) / calm)
        row.after.append(await rate(window.mended, window.ended) / calm)


@dataclass(frozen=True, slots=True)
class _Restart:
    """A run that was cut short and its job's next: when it began, when it was given back, when the next began."""

    worker_id: UUID
    began: float
    cut: float
    again: float


def _count_restarts(
    row: Row, window: Window, restarts: Sequence[_Restart], blows: Sequence[tuple[UUID, float]]
) -> None:
    """From the blow to its worker, else from the claim whose answer was lost, until the job runs again."""
    for one in restarts:
        blow = max((at for worker_id, at in blows if worker_id == one.worker_id and at <= one.cut), default=None)
        if blow is not None and window.broke <= blow < window.ended:
            row.again.append(one.again - blow)
        elif blow is None and window.broke <= one.cut < window.ended:
            row.again.append(one.again - max(window.broke, one.began))


async def _count_starts(row: Row, window: Window, connection: AsyncConnection, returns: Sequence[float]) -> None:
    for back in returns:
        first = (await connection.execute(_FIRST, {"since": _moment(back)})).scalar()
        if first is not None:
            row.first_back.append(first.timestamp() - back)
    spans = {
        "calm": (window.calm_from, window.broke),
        "during": (window.broke, returns[0] if returns else window.mended),
        "later": ((returns[-1] if returns else window.mended) + 5, window.ended),
    }
    for name, (since, until) in spans.items():
        delays = await connection.execute(_START, {"since": _moment(since), "until": _moment(until)})
        row.start.setdefault(name, []).extend(delays.scalars())


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that so large a share of them does not exceed; None without values."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _made_at(subject: str) -> float | None:
    """When this id was drawn: a UUIDv7 begins with the milliseconds since the epoch."""
    try:
        return (UUID(subject).int >> 80) / 1000
    except ValueError:
        return None
