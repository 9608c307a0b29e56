"""What the producers know of their own transactions, written down outside the database."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

POSTING = "posting"
CATALOGUE = "catalogue"


@dataclass(frozen=True, slots=True)
class Told:
    """One enqueue as its producer saw it end; `order_id` only where it was an order's."""

    kind: str
    job_id: UUID
    order_id: UUID | None
    committed: bool


class Notebook:
    """An append-only file of JSON lines: one before each commit, one after the commit or the rollback."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self.committed = 0
        self.rolled_back = 0

    @property
    def ended(self) -> int:
        """How many enqueues have ended, either way."""
        return self.committed + self.rolled_back

    def intend(self, kind: str, job_id: UUID, order_id: UUID | None = None) -> None:
        """The transaction that enqueued this job is about to end."""
        self._write(said="intent", kind=kind, job=str(job_id), order=order_id and str(order_id))

    def ended_with(self, job_id: UUID, *, committed: bool) -> None:
        """It has ended."""
        self._write(said="committed" if committed else "rolled back", job=str(job_id))
        if committed:
            self.committed += 1
        else:
            self.rolled_back += 1

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def _write(self, **line: object) -> None:
        self._file.write(json.dumps(line) + "\n")


def read(path: Path) -> Iterator[Told]:
    """Every enqueue in the file; one whose end nobody wrote down counts as not committed."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    committed = {line["job"] for line in lines if line["said"] == "committed"}
    for line in lines:
        if line["said"] == "intent":
            order_id = UUID(line["order"]) if line["order"] else None
            yield Told(line["kind"], UUID(line["job"]), order_id, line["job"] in committed)
