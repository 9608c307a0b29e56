"""`exarq schedules`: what can be typed of schedules; the work of each command is a module beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.options import AsJson, Yes

schedules_app = typer.Typer(help="Look at schedules; add, pause, resume, run or remove them.", no_args_is_help=True)

NAME = typer.Argument(metavar="NAME", help="The schedule's name.", show_default=False)
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="The schedules' names.", show_default=False)]
All = Annotated[bool, typer.Option("--all", metavar="", help="All of them.")]


@schedules_app.command("list")
def list_schedules(as_json: AsJson = False) -> None:
    """List the schedules: when each ticks, next and last."""
    from worker.cli.schedules.listing import print_list

    print_list(as_json=as_json)


@schedules_app.command("add", short_help="Have a job enqueued by the clock.")
def add_schedule(
    job: Annotated[str, typer.Argument(help="The job's name, such as billing.charge.", show_default=False)],
    args: Annotated[
        str, typer.Argument(metavar="JSON", help="Its arguments as a JSON object; - reads them from stdin.")
    ] = "{}",
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="The schedule's name; else the job's.", show_default=False)
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(
            "--cron", help="Minute, hour, day, month, weekday, such as '0 3 * * MON-FRI'.", show_default=False
        ),
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option("--timezone", "-z", help="Whose clocks --cron means; UTC without.", show_default=False),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option("--every", metavar="TIME", help="Instead: 90s, 15m, 2h, 7d.", show_default=False),
    ] = None,
    catch_up: Annotated[
        str | None,
        typer.Option("--catch-up", help="What missed ticks get: skip, last or all.", show_default="last"),
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option("--overlap", help="skip: no job while the last one has not ended.", show_default="allow"),
    ] = None,
    queue: Annotated[
        str | None, typer.Option("--queue", "-q", help="Another queue than the job's own.", show_default=False)
    ] = None,
    priority: Annotated[
        int | None, typer.Option("--priority", "-p", help="0 (first) to 9.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have a job enqueued by the clock and print the schedule's name; ends with 1 when the name is taken."""
    from worker.cli.schedules.changing import add

    options = {"name": name, "cron": cron, "timezone": timezone, "catch_up": catch_up, "overlap": overlap}
    add(job, args, {**options, "queue": queue, "priority": priority}, every=every, as_json=as_json)


@schedules_app.command("pause", short_help="Have schedules not tick for now.")
def pause_schedules(names: Names = None, everything: All = False, yes: Yes = False, as_json: AsJson = False) -> None:
    """Have schedules not tick until they are resumed; a new release of the code changes nothing about it."""
    from worker.cli.schedules.changing import change

    change("pause", names or [], everything=everything, yes=yes, as_json=as_json)


@schedules_app.command("resume", short_help="Have paused schedules tick again.")
def resume_schedules(names: Names = None, everything: All = False, yes: Yes = False, as_json: AsJson = False) -> None:
    """Have paused schedules tick again, each with its next tick; those of the pause are not made up for."""
    from worker.cli.schedules.changing import change

    change("resume", names or [], everything=everything, yes=yes, as_json=as_json)


@schedules_app.command("run", short_help="Enqueue a schedule's job now.")
def run_schedule(name: Annotated[str, NAME], as_json: AsJson = False) -> None:
    """Enqueue a schedule's job now and print its id; its ticks come as they would."""
    from worker.cli.schedules.changing import run

    run(name, as_json=as_json)


@schedules_app.command("remove", short_help="Delete schedules.")
def remove_schedules(names: Names = None, everything: All = False, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete schedules; their jobs stay. Ends with 1 for one that the code declares: pause that, or change the code."""
    from worker.cli.schedules.changing import change

    change("remove", names or [], everything=everything, yes=yes, as_json=as_json)
