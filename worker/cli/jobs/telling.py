"""What came of the jobs that somebody wanted moved, in words and as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Final

import typer

from worker.cli.jobs.ids import no_such
from worker.cli.output import complain, note, print_json, print_line
from worker.flow.by_hand import DONE, CameTo, Verb

_MOST_NAMED: Final = 10

_DONE: Final = {
    "cancelled": "is cancelled and will not run",
    "requested": "runs; its worker was asked to cancel it",
    "retried": "waits again and is due now",
    "deleted": "is deleted, with its attempts",
}
_ONE: Final = {
    ("cancel", "final"): "has {state} already, so there is nothing to cancel",
    ("retry", "not final"): "is {state}, so there is nothing to retry",
    ("retry", "key taken"): "was not retried: another job holds its unique key; cancel that one, or wait until it ends",
    ("delete", "not final"): "is {state}; cancel it first, and delete it when it has ended",
    ("retry", "asked after"): "{young}; retry it then",
    ("delete", "asked after"): "{young}; delete it then",
}
_YOUNG: Final = (
    "succeeded less than a minute ago, and its worker may still have to ask whether its COMMIT took place, so it stays"
    " until it is a minute old or its worker has stopped"
)
RUN_NOW: Final = "; to have it run now, cancel it first"
"""What somebody can do who wants to retry a job that waits for its next attempt."""
_MANY: Final = {
    "changed": "had changed meanwhile and were left as they are",
    "final": "had ended already",
    "not final": "have not ended, so there is nothing to {verb}",
    "locked": "are locked by other transactions; try again when those have ended",
    "key taken": "were passed by: other jobs hold their unique keys",
    "asked after": "have succeeded less than a minute ago under a worker that lives and may still ask for them",
    "unknown": "are not there: they never existed, were rolled back, or were pruned",
}
_COUNTED: Final = {"requested": "asked to cancel (they run)", "retried": "queued again"}


def tell_one(verb: Verb, came: CameTo, *, as_json: bool) -> None:
    """Say what came of one job; ends with 1 when it was not moved, with 2 while another transaction holds it."""
    done = came.outcome in DONE[verb]
    if came.outcome == "unknown":
        raise no_such(came.job_id)
    if came.outcome == "locked":
        complain(f"another transaction keeps job {came.job_id} locked; try again when it has ended")
        raise typer.Exit(2)
    if not done and not (verb == "cancel" and came.state == "cancelled"):
        complain(f"job {came.job_id} {_why_not(verb, came)}")
        raise typer.Exit(1)
    if as_json:
        print_json(dataclasses.asdict(came))
    else:
        print_line(f"job {came.job_id} {_DONE[came.outcome] if done else 'was cancelled before'}")


def _why_not(verb: Verb, came: CameTo) -> str:
    if came.outcome == "changed":
        again = "; --state succeeded runs it once more" if (verb, came.state) == ("retry", "succeeded") else ""
        return f"{_is(came)}, so it was left as it is{again}"
    said = _ONE[verb, came.outcome].format(state=came.state, young=_YOUNG)
    return said + (RUN_NOW if (verb, came.state) == ("retry", "queued") else "")


def _is(came: CameTo) -> str:
    return f"has {came.state}" if came.state in ("succeeded", "failed") else f"is {came.state}"


def tell_many(verb: Verb, done: Sequence[CameTo], *, as_json: bool, named: bool) -> None:
    """Say how many came to what; ends with 1 when one that was meant was not moved, unless it had changed by itself."""
    counts = Counter(one.outcome for one in done)
    others = [one for one in done if one.outcome not in DONE[verb]]
    if as_json:
        print_json({"jobs": len(done), "outcomes": dict(counts), "others": [dataclasses.asdict(one) for one in others]})
    elif moved := [f"{counts[word]:,} {_COUNTED.get(word, word)}" for word in DONE[verb] if counts[word]]:
        print_line(", ".join(moved))
    for outcome in [word for word in counts if word not in DONE[verb]]:
        which = [str(one.job_id) for one in others if one.outcome == outcome]
        shown = f" ({', '.join(which[:_MOST_NAMED])}{', …' if len(which) > _MOST_NAMED else ''})" if named else ""
        note(f"{counts[outcome]:,} {_MANY[outcome].format(verb=verb)}{shown}")
    missed = sum(one.outcome != "changed" for one in others) if not named else len(others)
    if missed:
        complain(f"{missed:,} of {len(done):,} jobs were not moved; the notes say why")
        raise typer.Exit(1)
