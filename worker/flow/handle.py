"""What whoever enqueued a job holds of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias
from uuid import UUID

Happened: TypeAlias = Literal["created", "exists", "replaced"]


@dataclass(frozen=True, slots=True)
class Handle:
    """A job that was enqueued; it exists once the transaction commits.

    Args:
        id: the job's id, which `exarq jobs show` takes.
        name: the name of its definition.
        happened: "created"; or what became of an enqueue whose key a job had: that one "exists", or was "replaced".

    """

    id: UUID
    name: str
    happened: Happened = "created"
