"""Which jobs a person means: by filters, or by a part of an id."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Text, cast, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from worker.core.states import FINAL, JobState
from worker.db.models import Job, constant
from worker.db.reads import is_shown_as

SHORTEST_PART: Final = 8
_LONGEST: Final = 32


@dataclass(frozen=True, slots=True)
class Filters:
    """What narrows the jobs down; whatever is None does not.

    Args:
        state: the state as people name it.
        name: the name of the definition.
        queue: the queue.
        older_than: how long ago it ended, or was enqueued when it has not ended.

    """

    state: str | None = None
    name: str | None = None
    queue: str | None = None
    older_than: timedelta | None = None

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return any(value is not None for value in (self.state, self.name, self.queue, self.older_than))

    def conditions(self) -> list[ColumnElement[bool]]:
        """What a job must fulfil."""
        found: list[ColumnElement[bool]] = []
        if self.state is not None:
            found.append(is_shown_as(self.state))
        if self.name is not None:
            found.append(Job.name == self.name)
        if self.queue is not None:
            found.append(Job.queue == self.queue)
        if self.older_than is not None:
            before = func.statement_timestamp() - self.older_than
            found.append(or_(Job.finished_at < before, Job.finished_at.is_(None) & (Job.enqueued_at < before)))
        return found


class Chosen(NamedTuple):
    """One job that a person means."""

    id: UUID
    name: str


async def by_filters(session: AsyncSession, states: Collection[JobState], filters: Filters) -> list[Chosen]:
    """The jobs in these states that match, in no order: found by the indexes of the states, never by all of history."""
    query = select(Job.id, Job.name).where(*_matching(states, filters))
    return [Chosen(*row) for row in await session.execute(query)]


async def count(session: AsyncSession, states: Collection[JobState], filters: Filters) -> int:
    """How many jobs in these states match."""
    return await session.scalar(select(func.count()).select_from(Job).where(*_matching(states, filters))) or 0


def _matching(states: Collection[JobState], filters: Filters) -> list[ColumnElement[bool]]:
    found = [or_(*(Job.state == constant(state) for state in sorted(states))), *filters.conditions()]
    if set(states) <= FINAL and filters.older_than is not None:
        found.append(Job.finished_at < func.statement_timestamp() - filters.older_than)
    return found


async def by_ids(session: AsyncSession, ids: Collection[UUID]) -> list[Chosen]:
    """Those of these jobs that there are."""
    query = select(Job.id, Job.name).where(Job.id.in_(list(ids)))
    return [Chosen(*row) for row in await session.execute(query)]


def part_of_id(text: str) -> str | None:
    """The hexadecimal digits of what may be the beginning or the end of an id; None for anything else."""
    digits = text.replace("-", "").lower()
    return digits if re.fullmatch(f"[0-9a-f]{{{SHORTEST_PART},{_LONGEST - 1}}}", digits) else None


async def by_part(session: AsyncSession, digits: str) -> list[UUID]:
    """Jobs whose id begins so, by the primary key; if none does, those whose id ends so: three at the most.

    The beginning is the time, which jobs of one minute share; the end is random, but finding it reads the whole table.
    """
    low, high = (UUID(digits.ljust(_LONGEST, filler)) for filler in "0f")
    found = await _three(session, Job.id.between(low, high))
    ending = func.right(func.replace(cast(Job.id, Text), "-", ""), len(digits))
    return found or await _three(session, ending == digits)


async def _three(session: AsyncSession, condition: ColumnElement[Any]) -> list[UUID]:
    return list(await session.scalars(select(Job.id).where(condition).limit(3)))
