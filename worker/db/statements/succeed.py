"""Running → succeeded: one in the attempt's own transaction, many by a flush."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Text, Uuid, bindparam, cast, func, null, true, update
from sqlalchemy.dialects.postgresql import JSONB

from worker.core.states import JobState
from worker.db.models import Job, constant
from worker.db.statements.rows import given_rows, held_rows

# A client that goes silent between this statement and its COMMIT is ended by the server.
_SILENCE_LIMIT_MS: Final = "5000"

SUCCEED = (
    update(Job)
    .where(
        Job.id == bindparam("job_id", type_=Uuid),
        Job.token == bindparam("mine", type_=Uuid),
        Job.state == constant(JobState.RUNNING),
    )
    .values(
        state=JobState.SUCCEEDED,
        result=cast(bindparam("json", type_=Text), JSONB),
        finished_at=func.clock_timestamp(),
        error=null(),
    )
    .returning(Job.id, func.set_config("idle_in_transaction_session_timeout", _SILENCE_LIMIT_MS, true()))
)


def _succeed_many_statement() -> Any:
    held = held_rows(given_rows(("job_id", Uuid), ("mine", Uuid), ("json", Text)))
    return (
        update(Job)
        .where(Job.id == held.c.id)
        .values(
            state=JobState.SUCCEEDED,
            result=cast(held.c.json, JSONB),
            finished_at=func.clock_timestamp(),
            error=null(),
        )
        .returning(Job.id, Job.token)
    )


SUCCEED_MANY = _succeed_many_statement()
