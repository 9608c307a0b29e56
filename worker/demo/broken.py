"""What `exarq demo --break` runs: the job's writes are committed first, its completion follows in another transaction.

That is how most queues work, and why their jobs have to be idempotent. Loaded by the workers of that demo, never else.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy.orm import Session

from worker.core.remarks import Remarks
from worker.db.transitions import Held
from worker.flow.attempt import Attempt

_BETWEEN_THE_TWO_COMMITS = 0.1  # seconds; a busy database does not need our help to take as long


async def _commit_then_complete(attempt: Any, held: Held, result: str, remarks: Remarks) -> bool:
    if attempt._session is None:
        return False

    def commit_the_writes_alone(session: Session) -> None:
        session.commit()
        if attempt.transaction.taken:
            attempt.transaction.commit()

    await attempt._session.run_sync(commit_the_writes_alone)
    attempt._work.publisher.publish(attempt.hints)
    await asyncio.sleep(_BETWEEN_THE_TWO_COMMITS)
    return False  # so that the flusher completes it, as it does for a job without writes


Attempt.commit_success = _commit_then_complete  # type: ignore[assignment,method-assign]
