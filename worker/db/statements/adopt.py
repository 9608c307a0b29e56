"""– → queued for what plain ARQ code put into Redis, or → failed where it cannot run; the same enqueue only once."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Integer, Interval, Text, Uuid, case, cast, func, select, text
from sqlalchemy.dialects.postgresql import JSONB, insert

from worker.core.states import JobState
from worker.db.models import ADOPTED, Job
from worker.db.statements.enqueue import given_calls

GIVEN: dict[str, Any] = {
    "id": Uuid,
    "name": Text,
    "queue": Text,
    "args": Text,
    "age": Interval,
    "delay": Interval,
    "expires_in": Interval,
    "attempt": Integer,
    "error": Text,
    "arq_id": Text,
    "arq_enqueued": BigInteger,
}


def _adopt_statement() -> Any:
    given = given_calls(GIVEN)
    of, now = given.c, func.statement_timestamp()
    values: dict[str, Any] = {
        "id": of.id,
        "name": of.name,
        "queue": of.queue,
        "args": cast(of.args, JSONB),
        "state": case((of.error.is_(None), JobState.QUEUED.value), else_=JobState.FAILED.value),
        "enqueued_at": now - of.age,
        "first_due_at": now + of.delay,
        "run_at": now + of.delay,
        "expires_at": now + of.expires_in,
        "attempt": of.attempt,
        "failures": of.attempt,
        "finished_at": case((of.error.is_not(None), now)),
        "error": of.error,
        "arq_id": of.arq_id,
        "arq_enqueued": of.arq_enqueued,
    }
    return (
        insert(Job.__table__)  # type: ignore[arg-type]  # the table, as for an enqueue
        .from_select(list(values), select(*values.values()), include_defaults=False)
        .on_conflict_do_nothing(index_elements=["arq_id", "arq_enqueued"], index_where=text(ADOPTED))
        .returning(Job.__table__.c.id)
    )


ADOPT = _adopt_statement()
