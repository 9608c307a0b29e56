"""`exarq jobs retry | cancel | delete`: the jobs with these ids, or after a question all that match."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from worker.cli.ask import confirm
from worker.cli.database import migrated_database
from worker.cli.jobs import ids
from worker.cli.jobs.listing import check_state
from worker.cli.jobs.telling import RUN_NOW, tell_many, tell_one
from worker.cli.modules import load_jobs
from worker.cli.options import age
from worker.cli.output import note, progress
from worker.core.errors import ArgumentsInvalid
from worker.core.registry import default_registry
from worker.core.states import FINAL, JobState
from worker.db import choose
from worker.db.choose import Chosen, Filters
from worker.db.reads import stored_state
from worker.flow.by_hand import CameTo, Verb, move_many
from worker.flow.publish import Publisher
from worker.observe.events import CancelNotTold, Event, PublishFailed, listen
from worker.settings import Settings, load_settings

_CAN_BE: Final[dict[Verb, frozenset[JobState]]] = {
    "retry": FINAL,
    "cancel": frozenset({JobState.QUEUED, JobState.RUNNING}),
    "delete": FINAL,
}
_ROUNDS: Final = 5
_BETWEEN_ROUNDS: Final = 0.3


@dataclass(frozen=True, slots=True)
class Wish:
    """Which jobs somebody wants moved, as typed."""

    verb: Verb
    ids: Sequence[str]
    state: str | None
    name: str | None
    queue: str | None
    older_than: str | None
    everything: bool

    @property
    def filters(self) -> Filters:
        """What narrows them down."""
        return Filters(state=self.state, name=self.name, queue=self.queue, older_than=age(self.older_than))

    @property
    def states(self) -> frozenset[JobState]:
        """The states a job may be in to be meant by filters; who retries all means what has failed."""
        if self.state is not None:
            return frozenset({stored_state(self.state)})
        return frozenset({JobState.FAILED}) if self.verb == "retry" else _CAN_BE[self.verb]

    @property
    def guard(self) -> Collection[JobState] | None:
        """The states a job must still be in when it is moved; None: any that can be."""
        if not self.ids or self.state is not None:
            return self.states
        # A success is not undone by a second run: who wants one says so.
        return frozenset(JobState) - {JobState.SUCCEEDED} if self.verb == "retry" else None

    def check(self) -> None:
        """Raise `ArgumentsInvalid` for what cannot be meant."""
        check_state(self.state)
        ids.check(self.ids)
        filters = self.filters
        if self.ids and (self.everything or dataclasses.replace(filters, state=None).given):
            raise ArgumentsInvalid("give either ids or filters, not both; --state may stand beside ids")
        if not (self.ids or self.everything or filters.given):
            raise ArgumentsInvalid(
                f"say which jobs to {self.verb}: by id, by --state, --name, --queue or --older-than, or --all"
            )
        if not self.states <= _CAN_BE[self.verb]:
            can = " or ".join(sorted(_CAN_BE[self.verb]))
            advice = "; cancel it first" if self.verb == "delete" else ""
            if self.verb == "retry" and self.states == {JobState.QUEUED}:
                advice = RUN_NOW
            raise ArgumentsInvalid(
                f"no job that is {self.state} can be {_PAST[self.verb]}, only one that is {can}{advice}"
            )


_PAST: Final = {"retry": "retried", "cancel": "cancelled", "delete": "deleted"}


def move(wish: Wish, *, yes: bool, as_json: bool) -> None:
    """Move the jobs and tell what came of each; without Redis a worker finds out a little later."""
    wish.check()
    settings = load_settings()
    if wish.verb == "retry":
        load_jobs(settings)
    done = asyncio.run(_move(settings, wish, yes=yes))
    if wish.ids and len(done) == 1:
        tell_one(wish.verb, done[0], as_json=as_json)
    elif as_json or done:
        tell_many(wish.verb, done, as_json=as_json, named=bool(wish.ids))
    else:
        note("no jobs match")


async def _move(settings: Settings, wish: Wish, *, yes: bool) -> list[CameTo]:
    publisher = Publisher.from_settings(settings)
    end = listen(_hear)
    try:
        async with migrated_database(settings) as engine:
            meant, there = await _choose(engine, wish)
            _ask(wish, there, len(meant), yes=yes)
            return await _in_rounds(engine, publisher, wish, meant)
    finally:
        await publisher.close()
        end()


async def _choose(engine: AsyncEngine, wish: Wish) -> tuple[list[UUID], list[Chosen]]:
    """The ids that are meant, and the jobs there are of them."""
    async with AsyncSession(engine) as session:
        if wish.ids:
            meant = await ids.resolve(session, wish.ids)
            return meant, await choose.by_ids(session, meant) if wish.verb == "retry" else []
        chosen = await choose.by_filters(session, wish.states, wish.filters)
        return [job.id for job in chosen], chosen


def _ask(wish: Wish, there: Sequence[Chosen], count: int, *, yes: bool) -> None:
    unknown = Counter(job.name for job in there if job.name not in default_registry) if default_registry.names() else {}
    if wish.verb == "retry" and unknown:
        named = ", ".join(sorted(unknown)[:5]) + (", …" if len(unknown) > 5 else "")
        note(
            f"{sum(unknown.values()):,} of these jobs have no function here ({named}): jobs.modules registers none of"
            " that name, and a job that no worker knows is failed in the end"
        )
        if not wish.ids:
            confirm(f"retry {_jobs(count)} all the same?", yes=yes)
            return
        confirm("retry all the same?", yes=yes)
    elif not wish.ids and count:
        confirm(f"{wish.verb} {_jobs(count)}?", yes=yes)


def _jobs(count: int) -> str:
    return f"{count:,} job{'' if count == 1 else 's'}"


async def _in_rounds(engine: AsyncEngine, publisher: Publisher, wish: Wish, meant: list[UUID]) -> list[CameTo]:
    """Move them, and a little later those again that another transaction held."""
    came: dict[UUID, CameTo] = {}
    with progress(f"{wish.verb} jobs", len(meant)) as advance:
        left = meant
        for round_ in range(_ROUNDS):
            if round_:
                await asyncio.sleep(_BETWEEN_ROUNDS)
            async for batch in move_many(engine, publisher, wish.verb, left, states=wish.guard):
                came.update({one.job_id: one for one in batch})
                advance(sum(one.outcome != "locked" for one in batch))
            left = [one.job_id for one in came.values() if one.outcome == "locked"]
            if not left:
                break
    return [came[job_id] for job_id in meant]


def _hear(event: Event) -> None:
    if isinstance(event, CancelNotTold):
        note(f"Redis does not answer ({event.error}); the job's worker sees the request with its next beat")
    elif isinstance(event, PublishFailed):
        note(f"Redis does not answer ({event.error}); a worker finds the jobs without it")
