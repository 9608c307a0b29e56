"""A job's id as people type it: whole, or its beginning or end."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import typer
from sqlalchemy.ext.asyncio import AsyncSession

from worker.cli.output import complain
from worker.core.errors import ArgumentsInvalid
from worker.db import choose
from worker.db.choose import SHORTEST_PART


def check(texts: Sequence[str]) -> None:
    """Raise `ArgumentsInvalid` for what can be no id, before anything is asked."""
    for text in texts:
        if _whole(text) is None and choose.part_of_id(text) is None:
            raise ArgumentsInvalid(
                f"{text!r} is not a job's id, such as 0199c0de-0000-7000-8000-000000000000, nor {SHORTEST_PART} or more"
                " characters of its end"
            )


async def resolve(session: AsyncSession, texts: Sequence[str]) -> list[UUID]:
    """The ids that are meant, each once; a whole one is not looked up.

    Raises: `ArgumentsInvalid` where several jobs may be meant, `Exit` with 1 where none is.
    """
    return list(dict.fromkeys([_whole(text) or await _looked_up(session, text) for text in texts]))


def no_such(what: object) -> typer.Exit:
    """Say that there is no such job."""
    complain(f"no job {what}; it never existed, was rolled back, or was pruned")
    return typer.Exit(1)


async def _looked_up(session: AsyncSession, text: str) -> UUID:
    digits = choose.part_of_id(text)
    assert digits is not None
    found = await choose.by_part(session, digits)
    if not found:
        raise no_such(f"whose id begins or ends with {text}")
    if len(found) > 1:
        raise ArgumentsInvalid(f"{text!r} may mean {', '.join(map(str, found[:2]))} or another; give more of the id")
    return found[0]


def _whole(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
