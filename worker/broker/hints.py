"""A hint: an id that says "this job may be due", and the small payload beside it."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from enum import Enum
from typing import NamedTuple
from uuid import UUID


class Hint(NamedTuple):
    """What publishing needs to know of a job; `due_at` is on this process's monotonic clock, and never leaves it."""

    job_id: UUID
    name: str
    queue: str
    due_at: float
    enqueued_ms: int
    installation: UUID
    priority: int


def due_at(due_in: float) -> float:
    """What a hint has of a job that is due in so many seconds, which may be negative."""
    return time.monotonic() + due_in


def payload_of(name: str, enqueued_ms: int, installation: UUID) -> str:
    """What lies beside such a hint: ARQ's fields, as JSON, and as `x` whose database has the truth; no arguments."""
    return f'{{"t":null,"f":{json.dumps(name)},"a":[],"k":{{}},"et":{enqueued_ms},"x":"{installation}"}}'


def ms_of(moment: datetime) -> int:
    """A moment as a hint has it: milliseconds since the epoch."""
    return int(moment.timestamp() * 1000)


class Owner(Enum):
    """Whom an id in Redis belongs to."""

    US = "us"
    ANOTHER_INSTALLATION = "another installation"
    PLAIN_ARQ = "plain ARQ"


_AS_WRITTEN = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def parse_id(raw: bytes) -> UUID | None:
    """The job's id; None for an id that Exarq never wrote (plain ARQ's have no dashes)."""
    return UUID(int=int(raw.replace(b"-", b""), 16)) if _AS_WRITTEN.fullmatch(raw) else None


def owner_of(raw_id: bytes, payload: bytes | None, installation: UUID) -> Owner:
    """Whose job this is when our database has no row for it: only what is surely ours may be dropped."""
    if payload is None:
        return Owner.US if parse_id(raw_id) else Owner.PLAIN_ARQ
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        return Owner.PLAIN_ARQ
    mark = fields.get("x") if isinstance(fields, dict) else None
    if mark is None:
        return Owner.PLAIN_ARQ
    return Owner.US if mark == str(installation) else Owner.ANOTHER_INSTALLATION
