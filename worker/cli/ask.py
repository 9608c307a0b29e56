"""A question before something that many jobs feel."""

from __future__ import annotations

import sys

import typer

from worker.cli.output import note, prompt
from worker.core.errors import ArgumentsInvalid


def confirm(question: str, *, yes: bool) -> None:
    """Return when the answer is yes.

    Raises: `Exit` with 1 when it is no, `ArgumentsInvalid` where nobody can answer.
    """
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise ArgumentsInvalid(f"{question} Nobody can answer without a terminal; say --yes")
    prompt(f"{question} [y/N] ")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        note("nothing was done")
        raise typer.Exit(1)
