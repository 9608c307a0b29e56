"""What can be typed to watch over an installation; the work of each command is a module beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.options import AsJson, OlderThan, Yes

operations = typer.Typer()


@operations.command(short_help="Show what waits, runs and was done.")
def queues(as_json: AsJson = False) -> None:
    """Show what waits, runs and was done in each queue, and how many workers take from it."""
    from worker.cli.overview import print_queues

    print_queues(as_json=as_json)


@operations.command(short_help="Show the workers.")
def workers(as_json: AsJson = False) -> None:
    """Show the workers: where they run, what they take, and when they beat last."""
    from worker.cli.overview import print_workers

    print_workers(as_json=as_json)


@operations.command(short_help="Check servers, modules, workers, queues.")
def doctor(as_json: AsJson = False) -> None:
    """Check PostgreSQL, Redis, the modules, the workers and the queues, and say what to do; ends with 1 on an error."""
    from worker.cli.doctor import examine

    raise typer.Exit(examine(as_json=as_json))


@operations.command(short_help="Delete old finished jobs.")
def prune(
    older_than: OlderThan = None,
    state: Annotated[
        str | None,
        typer.Option("--state", "-s", help="Only succeeded, failed or cancelled jobs.", show_default=False),
    ] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete finished jobs older than the settings keep them, or than --older-than, at least an hour."""
    from worker.cli.prune import prune_now

    prune_now(state=state, older_than=older_than, yes=yes, as_json=as_json)
