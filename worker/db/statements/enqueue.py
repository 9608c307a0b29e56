"""– → queued, in the transaction of whoever enqueues."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    DateTime,
    Float,
    Interval,
    SmallInteger,
    Text,
    Uuid,
    bindparam,
    cast,
    column,
    func,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, insert

from worker.db.models import UNIQUE_WHILE, Installation, Job

_DUE: dict[str, Any] = {"delay": Interval, "at": DateTime(timezone=True)}
PLACED: dict[str, Any] = {
    **_DUE,
    "priority": SmallInteger,
    "expires_in": Interval,
    "expires_at": DateTime(timezone=True),
}
_OWN: dict[str, Any] = {"id": Uuid, "args": Text}
_PLAIN: dict[str, Any] = {**_OWN, "name": Text, "queue": Text}
_FULL: dict[str, Any] = {**_PLAIN, **PLACED, "key": Text, "scope": Text, "lasts": Interval, "longest": Interval}


BETWEEN: Final = "\x1e"
"""Between the ids, and the arguments, of many enqueues that go as one text; no JSON has it."""


def given_calls(columns: dict[str, Any]) -> Any:
    """One row for each enqueue, from one array for each column; the array is the column's plural."""
    return (
        func.unnest(*(bindparam(f"{name}s", type_=ARRAY(type_)) for name, type_ in columns.items()))
        .table_valued(*(column(name, type_) for name, type_ in columns.items()), name="given")
        .render_derived()
    )


def told(table: Any) -> list[Any]:
    """What a hint needs to know of a row: its id, in how many seconds it is due, when it was enqueued, and where."""
    return [table.c.id, *_told(table.c.run_at, table.c.enqueued_at)]


def _told(run_at: Any, enqueued_at: Any) -> list[Any]:
    return [
        cast(func.extract("epoch", run_at - func.clock_timestamp()), Float),
        cast(func.extract("epoch", enqueued_at) * 1000, Float),
        select(Installation.id).scalar_subquery(),
    ]


def _enqueue_statement(columns: dict[str, Any]) -> Any:
    given = given_calls(columns)
    # Not now(): that is the start of the transaction, and a follow-up's delay counts from here.
    now: Any = func.clock_timestamp()
    if columns is _FULL:  # one look at the clock, for a deadline counts from the due time
        given = select(*given.c, now.label("moment")).subquery("placed")
        now = given.c.moment
    due: Any = func.coalesce(given.c.at, now + given.c.delay)
    if columns is _FULL:
        due = func.least(due, now + given.c.longest)  # which leaves out what is null: no bound
    values: dict[str, Any] = {
        "id": given.c.id,
        "name": given.c.name,
        "queue": given.c.queue,
        "args": cast(given.c.args, JSONB),
        "enqueued_at": now,
        "first_due_at": due,
        "run_at": due,
    }
    if columns is _FULL:
        values |= {
            "priority": given.c.priority,
            "expires_at": func.coalesce(given.c.expires_at, due + given.c.expires_in),
            "unique_key": given.c.key,
            "unique_for": given.c.scope,
            "unique_until": now + given.c.lasts,
        }
    return (
        insert(Job.__table__)  # type: ignore[arg-type]  # the table, so that no unit of work is paid for
        .from_select(list(values), select(*values.values()), include_defaults=False)
        .returning(*told(Job.__table__))
    )


ENQUEUE = _enqueue_statement({**_PLAIN, **_DUE})


def _enqueue_alike_statement() -> Any:
    """One row of what their hints need to know, for many enqueues that differ in their arguments only.

    What they share goes and comes once, for rows are most of what a thousand enqueues cost the driver. So they are
    enqueued at one moment, and wait in the order of their ids. What they do not share goes as text: asyncpg takes three
    times as long for an array, and before a connection's first it asks PostgreSQL for 15 ms what an array is.
    """
    ids, argss = (
        func.string_to_array(bindparam(name, type_=Text), func.chr(ord(BETWEEN))) for name in ("ids", "argss")
    )
    given = (
        func.unnest(cast(ids, ARRAY(Uuid)), argss)
        .table_valued(*(column(name, type_) for name, type_ in _OWN.items()), name="given")
        .render_derived()
    )
    at, delay = (bindparam(f"all_{name}", type_=type_) for name, type_ in reversed(_DUE.items()))
    now: Any = func.statement_timestamp()
    due: Any = func.coalesce(at, now + delay)
    values: dict[str, Any] = {
        "id": given.c.id,
        "name": bindparam("all_name", type_=Text),
        "queue": bindparam("all_queue", type_=Text),
        "args": cast(given.c.args, JSONB),
        "enqueued_at": now,
        "first_due_at": due,
        "run_at": due,
    }
    written = (
        insert(Job.__table__)  # type: ignore[arg-type]  # the table, so that no unit of work is paid for
        .from_select(list(values), select(*values.values()), include_defaults=False)
        .cte("written")
    )
    return select(*_told(due, now)).add_cte(written)


ENQUEUE_ALIKE = _enqueue_alike_statement()

ENQUEUE_FULL = _enqueue_statement(_FULL)

# A row whose key another job has is left out of the answer, and the caller's transaction goes on.
ENQUEUE_UNLESS_THERE = ENQUEUE_FULL.on_conflict_do_nothing(
    index_elements=["name", "unique_key"], index_where=text(UNIQUE_WHILE)
)
