"""What whoever enqueued a job holds of it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Handle:
    """A job that was enqueued; it exists once the transaction commits.

    Args:
        id: the job's id, which `exarq jobs show` takes.
        name: the name of its definition.

    """

    id: UUID
    name: str
