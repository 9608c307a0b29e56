"""`exarq schedules`: what is declared and what is added, listed, paused, resumed, run and removed."""

from __future__ import annotations

import pytest
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import JOBS, Command
from tests.life.jobs_for_tests import rows
from tests.support import hints

pytestmark = pytest.mark.timeout(300)

SEVEN = '{"invoice_id": 7}'
DECLARED = """
@job(cron="0 3 * * *", timezone="Europe/Berlin")
async def nightly(session: AsyncSession) -> None: ...
"""


async def test_a_schedule_is_added_listed_paused_resumed_run_and_removed(
    exarq: Command, engine: AsyncEngine, redis: ArqRedis
) -> None:
    added = exarq.cold("schedules", "add", "shop.charge", SEVEN, "--every", "15m", "--name", "dunning", "-p", "2")
    paused = exarq("schedules", "pause", "dunning")
    (standing,) = exarq("schedules", "list", "--json").json
    resumed = exarq("schedules", "resume", "dunning")
    listed = exarq("schedules", "list")
    ran = exarq("schedules", "run", "dunning")
    removed = exarq("schedules", "remove", "dunning")

    assert [(one.code, one.err) for one in (added, paused, resumed, listed, ran, removed)] == [(0, "")] * 6
    assert added.out == "dunning\n"
    assert paused.out == "schedule dunning does not tick until it is resumed\n"
    assert resumed.out == "schedule dunning ticks again\n"
    assert removed.out == "schedule dunning is removed\n"
    assert (standing["state"], standing["every"], standing["args"]) == ("paused", 900, {"invoice_id": 7})
    assert (standing["declared"], standing["cron"], standing["timezone"]) == (False, None, None)
    heading, line = listed.out.splitlines()
    assert heading.split() == ["name", "state", "when", "next", "last", "job"]
    assert line.split()[:5] == ["dunning", "active", "every", "15", "min"]
    (job,) = await rows(engine)
    assert (f"{job.id}\n", job.name, job.args) == (ran.out, "shop.charge", {"invoice_id": 7})
    assert list(await hints(redis, priority=2)) == [str(job.id)]
    assert exarq("schedules", "list").err == (
        "note: there are no schedules; declare one with @job(cron=…) or @job(every=…), or `exarq schedules add` one\n"
    )


async def test_what_the_code_declares_is_there_after_a_worker_has_started_and_is_paused_not_removed(
    exarq: Command, engine: AsyncEngine
) -> None:
    exarq.write("shop.py", JOBS + DECLARED)

    assert exarq("run", "--burst").code == 0
    (found,) = exarq("schedules", "list", "--json").json
    paused = exarq("schedules", "pause", "shop.nightly")
    removed = exarq("schedules", "remove", "shop.nightly")
    assert exarq("run", "--burst").code == 0
    (after,) = exarq("schedules", "list", "--json").json

    assert (found["name"], found["declared"], found["state"]) == ("shop.nightly", True, "active")
    assert (found["cron"], found["timezone"]) == ("0 3 * * *", "Europe/Berlin")
    assert paused.code == 0
    assert (removed.code, removed.out) == (1, "")
    assert "@job declares the schedule 'shop.nightly'" in removed.err
    assert after["state"] == "paused"


async def test_all_are_asked_for_first(exarq: Command) -> None:
    for name in ("one", "two"):
        exarq("schedules", "add", "shop.charge", SEVEN, "--cron", "0 3 * * *", "--name", name)

    asked = exarq("schedules", "pause", "--all").error
    sure = exarq("schedules", "pause", "--all", "--yes", "--json")

    assert "pause 2 schedules? Nobody can answer without a terminal; say --yes" in asked
    assert [one["state"] for one in sure.json] == ["paused", "paused"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("add", "shop.charge", SEVEN), "say when: by cron"),
        (("add", "shop.charge", SEVEN, "--cron", "0 3 * *"), "'0 3 * *' is no cron expression; it has five fields"),
        (("add", "shop.charge", SEVEN, "--cron", "0 25 * * *"), "is no cron expression: bad hour"),
        (
            ("add", "shop.charge", SEVEN, "--cron", "0 3 * * *", "--timezone", "Europe/Berln"),
            "there is no time zone 'Europe/Berln'; did you mean 'Europe/Berlin'?",
        ),
        (("add", "shop.charge", SEVEN, "--every", "5 minutes"), "'5 minutes' is not a time; write a number and a unit"),
        (("add", "shop.charge", SEVEN, "--every", "1h", "--catch-up", "some"), 'catch_up must be one of "skip"'),
        (("add", "shop.chage", SEVEN, "--every", "1h"), "no job named 'shop.chage'; did you mean 'shop.charge'?"),
        (("add", "shop.charge", "{}", "--every", "1h"), "invoice_id"),
        (("add", "shop.charge", "[]", "--every", "1h"), "not a JSON object"),
        (("pause",), "say which schedules to pause: their names, or --all"),
        (("pause", "x", "--all"), "say which schedules to pause: their names, or --all"),
    ],
)
async def test_what_is_typed_wrong_is_one_line_and_nothing_is_stored(
    args: tuple[str, ...], said: str, exarq: Command
) -> None:
    assert said in exarq("schedules", *args).error
    assert exarq("schedules", "list", "--json").json == []


@pytest.mark.parametrize("verb", ["pause", "resume", "run", "remove"])
async def test_a_schedule_that_is_not_there_ends_with_1_and_changes_none(verb: str, exarq: Command) -> None:
    exarq("schedules", "add", "shop.charge", SEVEN, "--every", "1h")
    before = exarq("schedules", "list", "--json").json

    names = ("shop.chrge",) if verb == "run" else ("shop.charge", "shop.chrge")
    done = exarq("schedules", verb, *names)

    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "exarq: no schedule named 'shop.chrge'; did you mean 'shop.charge'?; `exarq schedules list` shows them\n"
    )
    assert exarq("schedules", "list", "--json").json == before


async def test_a_name_that_is_taken_ends_with_1(exarq: Command) -> None:
    exarq("schedules", "add", "shop.charge", SEVEN, "--every", "1h")

    again = exarq("schedules", "add", "shop.charge", SEVEN, "--every", "2h")

    assert (again.code, again.out) == (1, "")
    assert "there is a schedule named 'shop.charge'; remove that one, or give this one another name" in again.err


async def test_a_schedule_that_no_worker_makes_tick_is_told(exarq: Command, engine: AsyncEngine) -> None:
    exarq("schedules", "add", "shop.charge", SEVEN, "--every", "1h")
    async with engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE exarq.schedule SET next_at = now() - interval '3 hours'")

    listed = exarq("schedules", "list")

    assert listed.out.splitlines()[1].split()[:2] == ["shop.charge", "late"]
    assert listed.err == (
        "note: no worker makes the ticks of shop.charge: does one run whose code declares it, or knows its job?\n"
    )
