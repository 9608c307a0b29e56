"""What several commands take: options, and the lengths of time that people write."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Final

import typer

from worker.core.errors import ArgumentsInvalid

AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")]
Queue = Annotated[str | None, typer.Option("--queue", "-q", help="Only this queue.", show_default=False)]
Name = Annotated[str | None, typer.Option("--name", "-n", help="Only this job.", show_default=False)]
OlderThan = Annotated[
    str | None,
    typer.Option("--older-than", metavar="AGE", help="Only what ended, or waits, for longer: 90s, 15m, 2h, 7d."),
]

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_OLDEST: Final = timedelta(days=36_500)


def age(text: str | None, what: str = "an age") -> timedelta | None:
    """The length of time that somebody typed, such as 2h or 7d.

    Raises: `ArgumentsInvalid`.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s?([smhdw])", text.strip(), re.ASCII)
    length = timedelta(**{_UNITS[found[2]]: float(found[1])}) if found else None
    if length is None or length > _OLDEST:
        raise ArgumentsInvalid(f"{text!r} is not {what}; write a number and a unit, such as 90s, 15m, 2h, 7d or 4w")
    return length
