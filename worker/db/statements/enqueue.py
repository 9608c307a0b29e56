"""– → queued, in the transaction of whoever enqueues."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ARRAY, DateTime, Float, Interval, Text, Uuid, bindparam, cast, column, func, insert, select
from sqlalchemy.dialects.postgresql import JSONB

from worker.db.models import Installation, Job


def _enqueue_statement() -> Any:
    columns: dict[str, Any] = {
        "id": Uuid,
        "name": Text,
        "queue": Text,
        "args": Text,
        "delay": Interval,
        "at": DateTime(timezone=True),
    }
    given = (
        func.unnest(*(bindparam(f"{name}s", type_=ARRAY(type_)) for name, type_ in columns.items()))
        .table_valued(*(column(name, type_) for name, type_ in columns.items()), name="given")
        .render_derived()
    )
    # Not now(): that is the start of the transaction, and a follow-up's delay counts from here.
    now = func.clock_timestamp()
    due = func.coalesce(given.c.at, now + given.c.delay)
    rows = select(given.c.id, given.c.name, given.c.queue, cast(given.c.args, JSONB), now, due, due)
    table = Job.__table__
    return (
        insert(Job.__table__)  # type: ignore[arg-type]  # the table, so that no unit of work is paid for
        .from_select(
            ["id", "name", "queue", "args", "enqueued_at", "first_due_at", "run_at"], rows, include_defaults=False
        )
        .returning(
            table.c.id,
            cast(func.extract("epoch", table.c.run_at - now), Float),
            cast(func.extract("epoch", table.c.enqueued_at) * 1000, Float),
            select(Installation.id).scalar_subquery(),
        )
    )


ENQUEUE = _enqueue_statement()
