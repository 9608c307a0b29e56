"""`exarq jobs show`: all of one job, and of each attempt that left something to tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncSession

from worker.cli.database import migrated_database
from worker.cli.errors import explanation, shortened
from worker.cli.jobs import ids
from worker.cli.output import ago, duration, print_facts, print_json, print_line, readable, state_text
from worker.db import reads
from worker.db.models import Attempt, Job
from worker.settings import load_settings

_USUAL_PRIORITY: Final = 5
_BAR: Final = 20


def print_one(text: str, *, whole_tracebacks: bool, as_json: bool) -> None:
    """Print all of one job."""
    ids.check([text])
    job, state = asyncio.run(_read(text))
    if as_json:
        print_json({**_columns(job), "state": state, "attempts": [_columns(attempt) for attempt in job.attempts]})
        return
    print_facts(_facts(job, state))
    for attempt in job.attempts:
        _print_attempt(attempt, whole_traceback=whole_tracebacks)


async def _read(text: str) -> tuple[Job, str]:
    async with migrated_database(load_settings()) as engine, AsyncSession(engine) as session:
        (job_id,) = await ids.resolve(session, [text])
        found = await reads.job(session, job_id)
        if found is None:
            raise ids.no_such(job_id)
        return found


def _facts(job: Job, state: str) -> dict[str, str | Text]:
    flagged = job.cancel_requested and state == "running"
    facts: dict[str, str | Text | None] = {
        "id": str(job.id),
        "name": job.name,
        "queue": job.queue,
        "state": Text.assemble(state_text(state), (", cancel requested", "yellow")) if flagged else state_text(state),
        "progress": _progress(job.progress),
        "priority": str(job.priority) if job.priority != _USUAL_PRIORITY else None,
        "unique key": _unique(job),
        "arguments": json.dumps(job.args, ensure_ascii=False),
        "result": json.dumps(job.result, ensure_ascii=False) if state == "succeeded" else None,
        "error": shortened(job.error) if job.error else None,
        "attempts": f"{job.attempt} ({job.failures} failed, {job.crashes} crashed)",
        "enqueued": _moment(job.enqueued_at),
        "first due": _moment(job.first_due_at),
        "due": _moment(job.run_at) if state in ("queued", "scheduled", "retrying") else None,
        "must start by": _moment(job.expires_at),
        "started": _moment(job.started_at),
        "finished": _moment(job.finished_at),
        "worker": str(job.worker_id) if job.worker_id else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _progress(progress: Mapping[str, Any] | None) -> str | None:
    """A bar and a share where the end is known, and what the job said."""
    if not progress:
        return None
    done, total, text = progress.get("done"), progress.get("total"), progress.get("text")
    parts = []
    if isinstance(done, int | float) and isinstance(total, int | float) and total > 0:
        share = min(max(done / total, 0.0), 1.0)
        full = int(share * _BAR)
        parts.append(f"{'█' * full}{'░' * (_BAR - full)} {share:.0%} ({done:,} of {total:,})")
    elif isinstance(done, int | float):
        parts.append(f"{done:,} done")
    if text:
        parts.append(str(text))
    return ", ".join(parts) or None


def _unique(job: Job) -> str | None:
    if job.unique_key is None:
        return None
    until = f"until {_moment(job.unique_until)}" if job.unique_until is not None else (job.unique_for or "")
    return f"{job.unique_key} ({until})" if until else job.unique_key


def _print_attempt(attempt: Attempt, *, whole_traceback: bool) -> None:
    print_line("")
    print_line(f"attempt {attempt.number}: {attempt.ending}, {_moment(attempt.finished_at)}", style="bold")
    if attempt.started_at is not None:
        took = (attempt.finished_at - attempt.started_at).total_seconds()
        print_line(f"ran {took:.3f} s on worker {attempt.worker_id}", style="dim")
    if attempt.blocked:
        print_line(f"held the event loop for {duration(attempt.blocked)}")
    for attribute, count in sorted((attempt.lazy_loads or {}).items(), key=lambda item: (-item[1], item[0])):
        print_line(f"loaded {attribute} lazily {count:,} time{'' if count == 1 else 's'}")
    said = explanation(attempt.error, attempt.traceback, whole=whole_traceback)
    if said:
        print_line(readable(said))


def _moment(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S %Z} ({ago(moment)})"


def _columns(row: Job | Attempt) -> dict[str, Any]:
    values = {column.key: getattr(row, column.key) for column in type(row).__table__.columns}
    return {key: value.total_seconds() if isinstance(value, timedelta) else value for key, value in values.items()}
