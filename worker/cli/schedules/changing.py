"""`exarq schedules add | pause | resume | run | remove`: each in a transaction of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Literal, TypeAlias, TypeVar

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from worker.cli.ask import confirm
from worker.cli.database import migrated_database
from worker.cli.enqueue import arguments
from worker.cli.modules import load_jobs
from worker.cli.options import age
from worker.cli.output import complain, note, print_json, print_line
from worker.cli.schedules.listing import as_plain
from worker.core.errors import ArgumentsInvalid, ScheduleRefused, UnknownSchedule
from worker.core.registry import default_registry
from worker.db.schedules import Scheduled
from worker.flow import schedules
from worker.flow.publish import Publisher
from worker.observe.events import Event, PublishFailed, listen
from worker.settings import Settings, load_settings

T = TypeVar("T")
Verb: TypeAlias = Literal["pause", "resume", "remove"]

_DONE: Final = {"pause": "does not tick until it is resumed", "resume": "ticks again", "remove": "is removed"}
_CHANGE: Final = {
    "pause": schedules.pause_schedule,
    "resume": schedules.resume_schedule,
    "remove": schedules.remove_schedule,
}


def add(job: str, text: str, options: dict[str, Any], *, every: str | None, as_json: bool) -> None:
    """Make a schedule and print its name."""
    settings, args, period = load_settings(), arguments(text), age(every, "a time")
    load_jobs(settings)
    default_registry.get(job)  # refused before anything is asked of a server

    made = _in_a_transaction(
        settings, lambda session: schedules.add_schedule(session, job, args, every=period, **options)
    )
    if as_json:
        print_json(as_plain(made))
    else:
        print_line(made.name)


def change(verb: Verb, names: Sequence[str], *, everything: bool, yes: bool, as_json: bool) -> None:
    """Pause, resume or remove these schedules, all or none of them."""
    if bool(names) == everything:
        raise ArgumentsInvalid(f"say which schedules to {verb}: their names, or --all")
    settings = load_settings()
    if verb == "remove":
        load_jobs(settings)
    if everything:
        there = _in_a_transaction(settings, schedules.list_schedules)
        names = [one.name for one in there]
        if not names:
            note("there are no schedules")
        else:
            confirm(f"{verb} {len(names):,} schedule{'' if len(names) == 1 else 's'}?", yes=yes)
    done = _in_a_transaction(settings, lambda session: _each(session, verb, sorted(set(names))))
    if as_json:
        print_json([as_plain(one) for one in done])
    else:
        for one in done:
            print_line(f"schedule {one.name} {_DONE[verb]}")


async def _each(session: AsyncSession, verb: Verb, names: Sequence[str]) -> list[Scheduled]:
    known = {one.name for one in await schedules.list_schedules(session)}
    if unknown := next((name for name in names if name not in known), None):
        raise UnknownSchedule(unknown, known)
    return [await _CHANGE[verb](session, name) for name in names]


def run(name: str, *, as_json: bool) -> None:
    """Enqueue a schedule's job and print its id."""
    settings = load_settings()
    load_jobs(settings)
    handle = _in_a_transaction(settings, lambda session: schedules.run_schedule(session, name))
    if handle.happened == "exists":
        note(f"the job of an earlier tick of {name} has not ended, and overlap is skip; this is that job")
    if as_json:
        print_json({"id": handle.id, "name": handle.name, "happened": handle.happened})
    else:
        print_line(str(handle.id))


def _in_a_transaction(settings: Settings, step: Callable[[AsyncSession], Awaitable[T]]) -> T:
    """What the step gives, committed; ends with 1 where a schedule is not there or may not be."""
    try:
        return asyncio.run(_committed(settings, step))
    except (UnknownSchedule, ScheduleRefused) as error:
        complain(str(error))
        raise typer.Exit(1) from None


async def _committed(settings: Settings, step: Callable[[AsyncSession], Awaitable[T]]) -> T:
    publisher = Publisher.from_settings(settings)
    end = listen(_hear)
    try:
        async with (
            migrated_database(settings) as engine,
            AsyncSession(engine, info=publisher.info) as session,
            session.begin(),
        ):
            return await step(session)
    finally:
        await publisher.close()
        end()


def _hear(event: Event) -> None:
    if isinstance(event, PublishFailed):
        note(f"the job is stored, but Redis does not answer ({event.error}); a worker finds the job without it")
