"""Running and still held: the fence before a commit of the job's own."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Uuid, bindparam, func, select, true

from worker.core.states import JobState
from worker.db.models import Job, stands_in

# A client that goes silent between this statement and its COMMIT is ended by the server.
SILENCE_LIMIT_MS: Final = "5000"

HOLD = (
    select(Job.id, func.set_config("idle_in_transaction_session_timeout", SILENCE_LIMIT_MS, true()))
    .where(
        Job.id == bindparam("job_id", type_=Uuid),
        Job.token == bindparam("mine", type_=Uuid),
        stands_in(JobState.RUNNING),
    )
    .with_for_update(key_share=True)
)
