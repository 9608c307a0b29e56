"""`exarq jobs`: what can be typed of jobs that are there; the work of each command is a module beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.options import AsJson, Name, OlderThan, Queue, Yes

jobs_app = typer.Typer(help="Look at jobs; retry, cancel or delete them.", no_args_is_help=True)

_STATES = "Only this state: queued, scheduled, retrying, running, succeeded, failed or cancelled."
_ID = "The job's id; the last eight characters will do."

State = Annotated[str | None, typer.Option("--state", "-s", help=_STATES, show_default=False)]
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID...", help=_ID, show_default=False)]
All = Annotated[bool, typer.Option("--all", metavar="", help="All that can be, however many.")]


@jobs_app.command("list")
def list_jobs(
    state: State = None,
    name: Name = None,
    queue: Queue = None,
    limit: Annotated[int, typer.Option("--limit", "-l", min=1, max=10_000, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    from worker.cli.jobs.listing import print_list

    print_list(state=state, name=name, queue=queue, limit=limit, as_json=as_json)


@jobs_app.command("show", short_help="Show all of one job.")
def show_job(
    job_id: Annotated[str, typer.Argument(metavar="ID", help=_ID, show_default=False)],
    traceback: Annotated[
        bool, typer.Option("--traceback", metavar="", help="Whole tracebacks, not only the frames of your own code.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show all of one job, with each attempt that left something to tell; ends with 1 when there is no such job."""
    from worker.cli.jobs.showing import print_one

    print_one(job_id, whole_tracebacks=traceback, as_json=as_json)


@jobs_app.command("retry", short_help="Run jobs once more that have ended.")
def retry_jobs(
    ids: Ids = None,
    state: State = None,
    name: Name = None,
    queue: Queue = None,
    older_than: OlderThan = None,
    everything: All = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Run jobs once more that have ended: those with these ids, or the failed ones that match.

    Nothing is counted against them any more; their attempts are numbered on. Ends with 1 when one was not retried.
    """
    from worker.cli.jobs.moving import Wish, move

    move(Wish("retry", ids or [], state, name, queue, older_than, everything), yes=yes, as_json=as_json)


@jobs_app.command("cancel", short_help="Cancel jobs that wait or run.")
def cancel_jobs(
    ids: Ids = None,
    state: State = None,
    name: Name = None,
    queue: Queue = None,
    older_than: OlderThan = None,
    everything: All = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Cancel jobs: what waits will not run, what runs is ended by its worker.

    Those with these ids, or those that match. Ends with 1 when it is too late for one.
    """
    from worker.cli.jobs.moving import Wish, move

    move(Wish("cancel", ids or [], state, name, queue, older_than, everything), yes=yes, as_json=as_json)


@jobs_app.command("delete", short_help="Delete jobs that have ended.")
def delete_jobs(
    ids: Ids = None,
    state: State = None,
    name: Name = None,
    queue: Queue = None,
    older_than: OlderThan = None,
    everything: All = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete jobs that have ended, with their attempts: those with these ids, or those that match.

    A success stays for a minute while its worker lives, which may still ask for it. Ends with 1 when one was not
    deleted.
    """
    from worker.cli.jobs.moving import Wish, move

    move(Wish("delete", ids or [], state, name, queue, older_than, everything), yes=yes, as_json=as_json)
