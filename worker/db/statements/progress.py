"""How far running jobs have come: no move, for a state and all that a move reads stay as they are."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text, Uuid, cast, update
from sqlalchemy.dialects.postgresql import JSONB

from worker.db.models import Job
from worker.db.statements.rows import by_key, given_rows, held_rows


def _note_progress_statement() -> Any:
    held = held_rows(given_rows(("job_id", Uuid), ("mine", Uuid), ("json", Text)))
    return update(Job).where(by_key(Job.id, held.c.id)).values(progress=cast(held.c.json, JSONB)).returning(Job.id)


NOTE_PROGRESS = _note_progress_statement()
