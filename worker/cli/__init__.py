"""The command line: what can be typed; each command's work is a module of its own, imported when it is called."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, cast

import typer

from worker.cli.jobs import jobs_app
from worker.cli.operations import operations
from worker.cli.options import AsJson
from worker.cli.output import complain
from worker.cli.schedules import schedules_app
from worker.core.errors import ArgumentsInvalid, ExarqError

_ENDINGS = (
    "Ends with 0: done; 1: not found, too late, or a fault of Exarq's own; 2: wrong input or settings, or a server is"
    " away; 3: a result that was waited for did not come in time; 130: interrupted."
)
# The base of all errors about what was typed, which typer does not name.
_WrongUse = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

app = typer.Typer(
    help="Background jobs that commit with your data, exactly once.",
    epilog=_ENDINGS,
    no_args_is_help=True,
    rich_markup_mode=None,  # its help imports a Markdown parser, a third of the time until help is seen
    pretty_exceptions_enable=False,  # it shows local variables, and passwords are in some
    context_settings={"help_option_names": ["-h", "--help"]},
)
db_app = typer.Typer(help="Look after Exarq's tables.", no_args_is_help=True)
app.add_typer(jobs_app, name="jobs")
app.add_typer(schedules_app, name="schedules")
app.add_typer(db_app, name="db")
app.add_typer(operations)


def main() -> None:
    """Run the command that was typed; what is wrong with it, or what Exarq raises on purpose, is one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _refuse_what_is_no_text(sys.argv[1:])
        sys.exit(app(prog_name="exarq", standalone_mode=False))
    except ExarqError as error:
        complain(str(error))
    except _WrongUse as error:
        said = error.format_message().strip()
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without its command
            typer.echo(said)
        else:
            asked = error.ctx.command_path if error.ctx else "exarq"
            complain(f"{said.rstrip('.')}; see `{asked} --help`")
    sys.exit(2)


def _refuse_what_is_no_text(words: list[str]) -> None:
    for word in words:
        if not word.isprintable() and word != word.encode("utf-8", "replace").decode():
            raise ArgumentsInvalid(f"{word!a} is not UTF-8 text; type it in a terminal that is set to UTF-8")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"exarq {version('exarq')}")
        raise typer.Exit


@app.callback()
def _exarq(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(short_help="Run a worker until Ctrl-C or SIGTERM.")
def run(
    burst: Annotated[bool, typer.Option("--burst", metavar="", help="End when no job is due and none runs.")] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", "-c", min=1, max=1000, help="Attempts running at once in each process.", show_default=False
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", "-p", min=1, max=256, help="Processes, restarted when they die.", show_default=False
        ),
    ] = None,
    queue: Annotated[
        list[str] | None, typer.Option("--queue", "-q", help="Take from this queue; repeatable.", show_default=False)
    ] = None,
    supervised: Annotated[str | None, typer.Option("--supervised", hidden=True)] = None,
) -> None:
    """Run a worker until Ctrl-C or SIGTERM; running jobs may end, a second Ctrl-C gives them back."""
    from worker.cli.run import run_until_stopped

    run_until_stopped(burst=burst, concurrency=concurrency, queues=queue, processes=processes, supervised=supervised)


@app.command(short_help="Enqueue one job and print its id.")
def enqueue(
    name: Annotated[str, typer.Argument(help="The job's name, such as billing.charge.", show_default=False)],
    args: Annotated[
        str, typer.Argument(metavar="JSON", help="Its arguments as a JSON object; - reads them from stdin.")
    ] = "{}",
    queue: Annotated[
        str | None, typer.Option("--queue", "-q", help="Another queue than the job's own.", show_default=False)
    ] = None,
    delay: Annotated[float, typer.Option("--delay", metavar="SECONDS", help="Due only after this time.")] = 0,
    key: Annotated[
        str | None, typer.Option("--key", help="Not where a job of this name and key is not done.", show_default=False)
    ] = None,
    priority: Annotated[
        int | None, typer.Option("--priority", "-p", help="0 (first) to 9; 5 is usual.", show_default=False)
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            help="Wait so long for its result and print that; ends with 1 if it fails, with 3 if it is not in time.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Enqueue one job and print its id; a name that is not known here is left to a worker that knows it."""
    from worker.cli.enqueue import enqueue_one

    code = enqueue_one(
        name,
        args,
        {"queue": queue, "delay": delay, "key": key, "priority": priority},
        as_json=as_json,
        wait=wait,
    )
    raise typer.Exit(code)


@app.command(short_help="Run servers and a worker for development.")
def dev() -> None:
    """Run servers that keep their data in .exarq/ and a worker that starts anew when the code changes."""
    from worker.cli.dev import run_dev

    run_dev()


@app.command(short_help="Tell whether the worker here lives.")
def check(as_json: AsJson = False) -> None:
    """Tell by heartbeat files whether the worker here lives: ends with 0 when each of its processes does, else 1."""
    from worker.check import check

    raise typer.Exit(check(as_json=as_json))


@app.command(short_help="Show the settings in force.")
def config(as_json: AsJson = False) -> None:
    """Show the settings in force and where each was set; passwords are masked."""
    from worker.cli.config import print_settings

    print_settings(as_json=as_json)


@db_app.command("upgrade", short_help="Create Exarq's tables, or bring them up to date.")
def upgrade(as_json: AsJson = False) -> None:
    """Bring Exarq's tables to what this version needs; safe to repeat, and while workers run."""
    from worker.cli.db import upgrade_schema

    upgrade_schema(as_json=as_json)


@db_app.command("current", short_help="Print at which revision the tables are.")
def current(as_json: AsJson = False) -> None:
    """Print at which revision the tables are."""
    from worker.cli.db import print_current

    print_current(as_json=as_json)


@db_app.command("sql", short_help="Print the SQL that makes the tables.")
def sql(
    since: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="REVISION", help="From this revision instead of the database's; base is an empty one."
        ),
    ] = None,
) -> None:
    """Print the SQL of the migrations that are still to be made, for somebody who applies it with psql."""
    from worker.cli.db import print_sql

    print_sql(since)


@app.command(short_help="Kill a worker, wipe Redis, then count.")
def demo(
    broken: Annotated[
        bool, typer.Option("--break", help="Prove that the proof can fail: break a rule; the demo must notice.")
    ] = False,
    orders: Annotated[int, typer.Option(min=600, help="How many payment orders are placed.")] = 2_000,
    as_json: AsJson = False,
) -> None:
    """Kill a worker and wipe Redis in the middle of the work, then count: nothing lost, nothing twice."""
    from worker.demo.story import run_demo

    raise typer.Exit(run_demo(orders=orders, broken=broken, json_only=as_json))
